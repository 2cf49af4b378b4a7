"""Every kind of fault that a soak draws, and the dice that say when one is to happen."""

import collections
import dataclasses
import random
import threading
from collections.abc import Collection
from typing import Literal

Moment = Literal[
  'transfer', 'link', 'end', 'step', 'chunks', 'decodes', 'hand-off', 'turn', 'session', 'pools', 'reader', 'wave'
]  # fmt: skip

RATES: dict[Moment, float] = {  # how often, as a share of what is drawn for a session: steps are many
  'transfer': 1.0,
  'link': 0.05,
  'end': 1.0,
  'step': 0.3,
  'chunks': 0.1,
  'decodes': 0.03,
  'hand-off': 0.1,
  'turn': 0.1,
}


@dataclasses.dataclass(frozen=True)
class Kind:
  """A kind of fault.

  Attributes:
    moment: The moment at which it is drawn: with each transfer, for a whole link as one begins, with each completion of
      one, with each step, as a step with prompt chunks or with decodes or a transfer has begun, whenever the loop
      waits, or once a session (for its log, and for its pools), request or wave.
    what: The fault, in words.
    errors: Parts of the error of a request that ends by it, of which one occurs; none if no request does.
    always: Whether requests end by it whatever the fault settings say.
  """

  moment: Moment
  what: str
  errors: tuple[str, ...] = ()
  always: bool = False


TOO_LATE = ('the transfer did not end within',)
_CORRUPT = ('CorruptError',)
_GONE = ('it is gone',)
_AWAY = (*_GONE, 'began another incarnation')  # one is over before the return of the one before is told
NOBODY_LEFT = 'every worker that'  # whoever could serve it was away for longer than patience
_GIVEN_UP = (*_AWAY, NOBODY_LEFT)
KINDS: dict[str, Kind] = {
  'transfer_refused': Kind('transfer', 'a transfer that cannot be started', ('the transport refused it',)),
  'transfer_fails': Kind('transfer', 'the link breaks under a transfer', ('the link broke',)),
  'transfer_stalls': Kind('transfer', 'a transfer that never arrives', TOO_LATE),
  'transfer_slow': Kind('transfer', 'a transfer that takes a while longer', TOO_LATE),
  'pages_corrupt': Kind('transfer', 'a bit of some pages that changes on the way', _CORRUPT),
  'pages_permuted': Kind('transfer', 'pages that arrive in another order', _CORRUPT),
  'pages_unwritable': Kind('transfer', 'pages that cannot be written: the target is lost', ('cannot be written',)),
  'link_slow': Kind('link', 'a link over which all transfers take longer, for a while', TOO_LATE),
  'link_stalls': Kind(
    'link', 'a link that stands still for a while: all that was sent arrives when it goes on', TOO_LATE
  ),
  'end_late': Kind('end', 'a transfer whose end is told past its deadline', TOO_LATE),
  'end_twice': Kind('end', 'a transfer whose end is told twice'),
  'end_lost': Kind('end', 'a transfer whose end is never told', TOO_LATE),
  'pass_refused': Kind('step', 'a step that cannot be dispatched', ('the step was refused',)),
  'pass_refused_halfway': Kind('step', 'a step of which only the first programs are dispatched', ('refused halfway',)),
  'pass_fails': Kind('step', 'a step that fails on its device', ('failed on its device',)),
  'pass_takes_pages': Kind('step', "a step that dies with its worker's pages", ('took its pages', 'has been deleted')),
  'pass_stalls': Kind('step', 'a step that stands still for a while'),
  'pass_has_nan': Kind('step', 'a step that meets NaN in a weight', ('logits that are not finite',), always=True),
  'lost_in_prefill': Kind('chunks', 'a worker lost while it computes a prompt', _GIVEN_UP),
  'lost_in_decode': Kind('decodes', 'a worker lost while it decodes', _GIVEN_UP),
  'lost_in_hand_off': Kind('hand-off', 'a worker lost while KV leaves it or comes to it', _GIVEN_UP),
  'worker_restarts': Kind('turn', 'a worker that is back at once, and tells of steps of before', _GONE),
  'worker_returns': Kind('turn', 'a lost worker that is being brought back, for longer than patience', _AWAY),
  'worker_given_up': Kind('turn', 'a lost worker that is told to be lost for good, and comes back', _GIVEN_UP),
  'prefill_full': Kind('pools', 'small pools of prefill workers, or of those that do both'),
  'decode_full': Kind('pools', 'small pools of decode workers, or of those that do both'),
  'both_full': Kind('pools', 'small pools everywhere'),
  'log_full': Kind('session', 'a disk that is full while the log is written'),
  'cancels': Kind('reader', 'a reader who wants no more'),
  'cancels_in_hand_off': Kind('hand-off', 'a reader who wants no more while KV is under way'),
  'storm': Kind('wave', 'many more requests than there is room for, most of them cancelled'),
}


class Dice:
  """Draws which faults are to happen, and counts those that did, in `counts`.

  Args:
    rng: The source of chance.
    share: The share of transfers that go wrong, from 0 to 1; of other moments as many as `RATES` has of it.
    kinds: Names of those that are wanted.
    counts: Gets how often each happened.
  """

  def __init__(self, rng: random.Random, share: float, kinds: Collection[str], counts: collections.Counter[str]):
    self._rng = rng
    self._share = share
    self._kinds: dict[Moment, list[str]] = {}
    for name in kinds:
      self._kinds.setdefault(KINDS[name].moment, []).append(name)
    self.counts = counts
    self._lock = threading.Lock()

  def draw(self, moment: Moment) -> str | None:
    """The kind of fault for a moment that has come, or None."""
    kinds = self._kinds.get(moment)
    if not kinds or self._rng.random() >= self._share * RATES[moment]:
      return None
    return self._rng.choice(kinds)

  def count(self, kind: str) -> None:
    """From any thread: a fault of this kind has acted."""
    with self._lock:
      self.counts[kind] += 1


def grouped(counts: collections.Counter[str]) -> dict[str, int]:
  """The number of faults of transfers, of links, of steps, of workers and of all else, by group."""
  names: dict[Moment, str] = {
    'transfer': 'transfers', 'link': 'links', 'end': 'ends', 'step': 'steps', 'chunks': 'workers',
    'decodes': 'workers', 'hand-off': 'hand-offs', 'turn': 'workers', 'pools': 'pools', 'session': 'logs',
    'reader': 'cancels', 'wave': 'storms',
  }  # fmt: skip
  groups = dict.fromkeys(names.values(), 0)
  for kind, count in counts.items():
    groups[names[KINDS[kind].moment]] += count
  return groups
