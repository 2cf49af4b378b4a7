"""Every kind of fault that a soak draws, and the dice that say when one happens."""

import collections
import dataclasses
import random
from collections.abc import Collection
from typing import Literal

Moment = Literal['transfer', 'end', 'pass', 'chunks', 'decodes', 'hand-off', 'turn', 'session', 'reader', 'wave']

RATES: dict[Moment, float] = {  # how often, as a share of what is drawn for a session: passes are many
  'transfer': 1.0,
  'end': 1.0,
  'pass': 0.3,
  'chunks': 0.1,
  'decodes': 0.03,
  'hand-off': 0.1,
  'turn': 0.05,
}


@dataclasses.dataclass(frozen=True)
class Kind:
  """A kind of fault.

  Attributes:
    moment: When it is drawn: with each transfer, with each completion of one, with each pass, as a pass with prompt
      chunks or with decodes or a transfer has begun, whenever the loop waits, or once a session, request or wave.
    what: What it is, in words.
    errors: What the error of a request says that ends by it, in one of these ways; none if none does.
  """

  moment: Moment
  what: str
  errors: tuple[str, ...] = ()


_TOO_LATE = ('the transfer did not end within',)
_CORRUPT = ('CorruptError',)
_GONE = ('it is gone',)
KINDS: dict[str, Kind] = {
  'transfer_refused': Kind('transfer', 'a transfer that cannot be started', ('the transport refused it',)),
  'transfer_fails': Kind('transfer', 'the link breaks under a transfer', ('the link broke',)),
  'transfer_stalls': Kind('transfer', 'a transfer that never arrives', _TOO_LATE),
  'transfer_slow': Kind('transfer', 'a transfer that takes a while longer', _TOO_LATE),
  'pages_corrupt': Kind('transfer', 'a bit of some pages that changes on the way', _CORRUPT),
  'pages_permuted': Kind('transfer', 'pages that arrive in another order', _CORRUPT),
  'pages_unwritable': Kind('transfer', 'pages that cannot be written: the target is lost', ('cannot be written',)),
  'end_late': Kind('end', 'a transfer whose end is told past its deadline', _TOO_LATE),
  'end_twice': Kind('end', 'a transfer whose end is told twice'),
  'end_lost': Kind('end', 'a transfer whose end is never told', _TOO_LATE),
  'pass_refused': Kind('pass', 'a pass that cannot be dispatched', ('the pass was refused',)),
  'pass_refused_halfway': Kind('pass', 'a pass of which only the first programs are dispatched', ('refused halfway',)),
  'pass_fails': Kind('pass', 'a pass that fails on its device', ('failed on its device',)),
  'pass_takes_pages': Kind('pass', "a pass that dies with its worker's pages", ('took its pages', 'has been deleted')),
  'pass_stalls': Kind('pass', 'a pass that stands still for a while'),
  'lost_in_prefill': Kind('chunks', 'a worker lost while it computes a prompt', _GONE),
  'lost_in_decode': Kind('decodes', 'a worker lost while it decodes', _GONE),
  'lost_in_hand_off': Kind('hand-off', 'a worker lost while KV leaves it or comes to it', _GONE),
  'worker_restarts': Kind('turn', 'a worker that is back at once, and tells of passes of its earlier life', _GONE),
  'log_full': Kind('session', 'a disk that is full while the log is written'),
  'cancels': Kind('reader', 'a reader who wants no more'),
  'storm': Kind('wave', 'many more requests than there is room for, most of them cancelled'),
}
UNANSWERED = ('every worker that', 'began another life')  # errors of a worker that was away for longer than patience


class Dice:
  """Draws which faults happen, and counts them.

  Args:
    rng: Where chance comes from.
    share: How many of the transfers go wrong, from 0 to 1; of other moments as many as `RATES` has of it.
    kinds: Names of those that are wanted.
    counts: Gets how often each happened.
  """

  def __init__(self, rng: random.Random, share: float, kinds: Collection[str], counts: collections.Counter[str]):
    self._rng = rng
    self._share = share
    self._kinds: dict[Moment, list[str]] = {}
    for name in kinds:
      self._kinds.setdefault(KINDS[name].moment, []).append(name)
    self._counts = counts

  def draw(self, moment: Moment) -> str | None:
    """What goes wrong at such a moment, if anything does; it counts as done."""
    kinds = self._kinds.get(moment)
    if not kinds or self._rng.random() >= self._share * RATES[moment]:
      return None
    kind = self._rng.choice(kinds)
    self._counts[kind] += 1
    return kind


def grouped(counts: collections.Counter[str]) -> dict[str, int]:
  """How many faults there were of transfers, of their ends, of passes, of workers, and of all else, by group."""
  names: dict[Moment, str] = {
    'transfer': 'transfers', 'end': 'ends', 'pass': 'passes', 'chunks': 'workers', 'decodes': 'workers',
    'hand-off': 'workers', 'turn': 'workers', 'session': 'logs', 'reader': 'cancels', 'wave': 'storms',
  }  # fmt: skip
  groups = dict.fromkeys(names.values(), 0)
  for kind, count in counts.items():
    groups[names[KINDS[kind].moment]] += count
  return groups
