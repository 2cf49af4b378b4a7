"""Requests as the books know them: what each has, where it stands, and the moves between the phases."""

import dataclasses
import enum
from collections.abc import Mapping, Sequence

import numpy as np

from pdjax.serving.actions import Step
from pdjax.serving.batch import Batch, TokenRows
from pdjax.serving.orders import PageCopies, PageNumbers
from pdjax.types.pools import PoolSpec, PoolSpecs
from pdjax.types.request import Request


class Phase(enum.Enum):
  """The stages of a request's way."""

  WAITING = 'waiting'  # nothing started
  PREFILLING = 'prefilling'  # some chunk started, more to come or to end
  PREFILLED = 'prefilled'  # first token delivered, its KV on a worker where it will not decode
  MOVING = 'moving'  # its KV on the way, the prompt all computed
  DECODING = 'decoding'  # in a slot
  LEAVING = 'leaving'  # to go on to decode elsewhere, once steps in flight have ended
  FOLLOWING = 'following'  # a further sample of a prompt whose KV is not yet where it will decode
  RESTARTING = 'restarting'  # to begin again, once orders about it have ended
  ENDING = 'ending'  # cancelled or rejected, to be confirmed
  FINISHED = 'finished'


_ENDS = frozenset({Phase.ENDING, Phase.FINISHED})
MOVES: dict[Phase, frozenset[Phase]] = {
  Phase.WAITING: _ENDS | {Phase.PREFILLING, Phase.FOLLOWING},
  Phase.PREFILLING: _ENDS | {Phase.PREFILLED, Phase.MOVING, Phase.DECODING, Phase.RESTARTING},
  Phase.PREFILLED: _ENDS | {Phase.MOVING, Phase.RESTARTING},
  Phase.MOVING: _ENDS | {Phase.MOVING, Phase.PREFILLED, Phase.DECODING, Phase.RESTARTING},  # more of it still travels
  Phase.DECODING: _ENDS | {Phase.LEAVING, Phase.RESTARTING},
  Phase.LEAVING: _ENDS | {Phase.PREFILLED, Phase.RESTARTING},
  Phase.FOLLOWING: _ENDS | {Phase.PREFILLED, Phase.MOVING, Phase.DECODING, Phase.RESTARTING},  # as heir of the carrier
  Phase.RESTARTING: _ENDS | {Phase.WAITING},
  Phase.ENDING: frozenset({Phase.FINISHED}),
  Phase.FINISHED: frozenset(),
}


@dataclasses.dataclass(slots=True, eq=False)
class StepInFlight:
  """A step that a worker was given.

  Attributes:
    order: The id of its order.
    step: The step as the policy asked for it.
    batch: The sequences that it decodes.
    owners: The owners of their rows then, see `TokenRows.owners`.
    ahead: Decode steps of it that have not ended; of one that stands, those that are with the worker.
    standing: Whether it stands, or stood.
    computing: The requests of its chunks.
  """

  order: int
  step: Step
  batch: Batch
  owners: np.ndarray
  ahead: int
  standing: bool = False
  computing: 'tuple[RequestState, ...]' = ()


@dataclasses.dataclass(slots=True)
class RequestState:
  """One request in the books; only the files of `serving/` change it.

  Attributes:
    request: The request.
    limit: Most tokens it may generate: its own `max_tokens`, or what is left of the model's context.
    phase: The stage it has reached.
    worker: The worker that prefills it.
    target: The worker that decodes it; the same as `worker` when nothing moves.
    started: Prompt tokens handed to the worker.
    first_in_flight: Whether an order in flight brings its first token.
    joined: The order with which it joined the batch; None before that.
    parted: The order from which on it is in the batch no more; None if it is.
    transfers: Transfers of its pages under way or to be tried again.
    pages: Pages it holds, by worker and cache kind.
    slot: Its slot on `target`.
    tokens_due: Tokens of its prompt that can be sent on, those under way to be computed counted.
    sent: Entries of its prompt's cache that were sent on, by cache kind.
    last_step: The order that computes the last of those due.
    computed: Whether its whole prompt is computed.
    admitted: Whether a step has put it into its slot.
    copies: By cache kind, the pages that it begins by copying, each with its own that it copies it into, if it is a
      further sample of a prompt.
    samples: The samples of its prompt, if there are several.
    delivered: The tokens it had when it was last begun again.
    attempts: Times it was begun, this one counted, but for those after it was preempted.
    preemptions: Times it was preempted.
    pages_ahead: Pages that it takes ahead of its tokens as it grows; None takes all that it may ever need.
    reach: Tokens for which it has pages where it decodes.
    growth: Pages that it got since its last order, by cache kind: the place of the first in the sequence, and all.
    keys: The keys of its blocks, by what makes them, with the number of delivered tokens among them.
    found: Its blocks that some place holds, by what makes them, with the state of the index that they are of.
    hits: Tokens of it that a worker holds, by worker and source, with the state of the index that they are of.
    fetchable: Tokens of it that a place holds for a worker, by place and worker, with that state.
    fetching: Copies of its blocks that are under way to workers that prefill.
    copies_asked: Times that a copy of its blocks was asked for, by the place that it goes to.
    fetched: The place that a copy of its blocks came from, and the tokens that were there before, by the place that it
      went to.
    goes_to: The worker that it is to decode at, once it has left the one where it did.
    prefilled_by: The worker that computed its prompt, wherever it moved since.
    source: The worker that computed what it began to decode with.
    unlike: Whether its KV is made in more than one way, so that none of it is cached any more.
    keeps: Whether what it has computed where it decodes stays cached as it begins again: it was preempted there.
    computed_to: Tokens, from the first one on, that its worker has computed or found.
    cached_tokens: Tokens of its prompt that were not computed as it was begun first, as they were cached.
    stored: Blocks of it that the index was told of, by worker.
    number: Its position in the order of arrival.
    prompt_len: Tokens of its prompt.
  """

  request: Request
  limit: int
  phase: Phase = Phase.WAITING
  worker: str | None = None
  target: str | None = None
  started: int = 0
  first_in_flight: bool = False
  joined: int | None = None
  parted: int | None = None
  transfers: int = 0
  pages: dict[str, PageNumbers] = dataclasses.field(default_factory=dict)
  slot: int | None = None
  tokens_due: int = 0
  sent: dict[str, int] = dataclasses.field(default_factory=dict)
  last_step: int | None = None
  computed: bool = False
  admitted: bool = False
  copies: PageCopies = dataclasses.field(default_factory=dict)
  samples: 'Samples | None' = dataclasses.field(default=None, repr=False)
  delivered: tuple[int, ...] = ()
  attempts: int = 1
  preemptions: int = 0
  pages_ahead: int | None = None
  reach: int = 0
  growth: dict[str, tuple[int, tuple[int, ...]]] = dataclasses.field(default_factory=dict)
  keys: dict[tuple[str, ...], tuple[int, bytes]] = dataclasses.field(default_factory=dict, repr=False)
  found: dict[tuple[str, ...], tuple[int, np.ndarray]] = dataclasses.field(default_factory=dict, repr=False)
  hits: dict[tuple[str, str | None], tuple[int, int]] = dataclasses.field(default_factory=dict, repr=False)
  fetchable: dict[tuple[str, str], tuple[int, int]] = dataclasses.field(default_factory=dict, repr=False)
  stored: dict[str, int] = dataclasses.field(default_factory=dict, repr=False)
  computed_to: int = 0
  fetching: int = 0
  copies_asked: dict[str, int] = dataclasses.field(default_factory=dict, repr=False)
  fetched: dict[str, tuple[str, int]] = dataclasses.field(default_factory=dict, repr=False)
  goes_to: str | None = None
  prefilled_by: str | None = None
  source: str | None = None
  unlike: bool = False
  keeps: bool = False
  cached_tokens: int = 0
  number: int = 0
  prompt_len: int = dataclasses.field(init=False, repr=False)  # asked for in every step; some prompts count slowly
  _tokens: list[int] = dataclasses.field(default_factory=list)  # those that are in no row
  _needs: dict[tuple[int, bool, int, int | None], dict[str, int]] = dataclasses.field(default_factory=dict, repr=False)
  _rows: TokenRows | None = dataclasses.field(default=None, repr=False)  # which has its others in that of its slot
  _steps: Sequence[StepInFlight] = dataclasses.field(default=(), repr=False)  # in flight where it decodes

  def __post_init__(self):
    self.prompt_len = self.request.prompt_len

  @property
  def tokens(self) -> list[int]:
    """Tokens generated and delivered."""
    if self._rows is not None:
      assert self.slot is not None
      self._catch_up()
      self._tokens += self._rows.take(self.slot)
    return self._tokens

  @property
  def num_tokens(self) -> int:
    """The number of `tokens`."""
    if self._rows is None:
      return len(self._tokens)
    assert self.slot is not None
    self._catch_up()
    return len(self._tokens) + self._rows.count(self.slot)

  def _catch_up(self) -> None:
    if self._rows is not None and self._rows.catch_up is not None:
      self._rows.catch_up()

  @property
  def steps_in_flight(self) -> int:
    """Most tokens that orders in flight can bring it; of a standing one, its steps that are with the worker."""
    count = int(self.first_in_flight)
    if self.joined is not None:
      for one in self._steps:
        if self.joined <= one.order and (self.parted is None or one.order < self.parted):
          count += one.ahead
    return count

  @property
  def is_new(self) -> bool:
    """Whether it was never begun again: what it has computed itself is no hit."""
    return self.attempts == 1 and not self.preemptions

  @property
  def prefill_len(self) -> int:
    """Tokens to compute before it can decode: its prompt and, begun again, what was delivered but the last token."""
    return self.prompt_len + max(len(self.delivered) - 1, 0)

  @property
  def prompt_left(self) -> int:
    """Tokens of `prefill_len` that no step was given yet."""
    return self.prefill_len - self.started

  @property
  def tokens_left(self) -> int:
    """Tokens that may still be asked for, those under way not counted."""
    return self.limit - self.num_tokens - self.steps_in_flight

  @property
  def most_tokens(self) -> int:
    """Most tokens that it may have cached: all but its last."""
    return self.prompt_len + self.limit - 1

  @property
  def next_tokens(self) -> int:
    """Tokens that are cached once one more step behind those under way has ended."""
    return self.prompt_len + self.num_tokens + self.steps_in_flight

  @property
  def can_step(self) -> bool:
    """Whether another decode step can bring it a token, and it has a page for that."""
    return self.tokens_left > 0 and self.next_tokens <= self.reach

  @property
  def can_move(self) -> bool:
    """Whether it decodes and may be moved: its prompt is all computed, and its pages hold all that they should."""
    return self.phase is Phase.DECODING and self.computed and not self.copies

  @property
  def is_cached(self) -> bool:
    """Whether what it leaves may be found by others, and what they left by it."""
    return self.request.cache_prefix and not self.unlike

  @property
  def followers(self) -> 'dict[str, RequestState]':
    """Samples that wait for the prompt which this one carries, by id; none if it carries none for others."""
    return self.samples.following if self.samples is not None and self.samples.carrier is self else {}

  @property
  def slots_needed(self) -> int:
    """Slots where it decodes: one, and one for each further sample that follows it."""
    return 1 + len(self.followers)

  def own_pages(self, pools: PoolSpecs, *, decodes: bool) -> dict[str, int]:
    """Pages of each cache kind that this one sequence takes when it begins.

    They are for its prompt and, with `decodes`, for all its tokens but the last, or for as many as it takes ahead.
    """
    return self.pages_ahead_of(pools, self.prefill_len + 1) if decodes else pools.pages_for(self.prefill_len)

  def pages_ahead_of(self, pools: PoolSpecs, tokens: int) -> dict[str, int]:
    """Pages of each cache kind that it is to have while it decodes and has so many tokens."""
    most = self.most_tokens
    return pools.pages_for(most) if self.pages_ahead is None else pools.pages_ahead_of(tokens, self.pages_ahead, most)

  def shared_pages(self, pool: PoolSpec) -> int:
    """Pages of a cache kind that samples share: all before that of the prompt's last token, which each of them writes.

    Windows and states change with every token, so that there is nothing to share.
    """
    return (self.prompt_len - 1) // pool.page_size if pool.kind.grows else 0

  def pages_needed(self, pools: PoolSpecs, *, decodes: bool) -> Mapping[str, int]:
    """As `own_pages`, those of the samples that follow it counted too: all but those that they share."""
    if self.samples is not None:
      own = self.own_pages(pools, decodes=decodes)
      return self._with_followers(own, pools) if decodes and self.followers else own
    key = id(pools), decodes, len(self.delivered), self.pages_ahead  # a policy asks for each worker, over and over
    needed = self._needs.get(key)
    if needed is None:
      needed = self._needs[key] = self.own_pages(pools, decodes=decodes)
    return needed

  def most_pages(self, pools: PoolSpecs, *, decodes: bool) -> dict[str, int]:
    """As `pages_needed`, for all tokens that it may ever have, whatever it takes ahead."""
    own = pools.pages_for(self.most_tokens if decodes else self.prefill_len)
    return self._with_followers(own, pools) if decodes and self.followers else own

  def _with_followers(self, own: dict[str, int], pools: PoolSpecs) -> dict[str, int]:
    for name, pool in pools.by_kind.items():
      own[name] += len(self.followers) * (own[name] - self.shared_pages(pool))
    return own


@dataclasses.dataclass(slots=True)
class Samples:
  """The samples of one prompt.

  One of them carries the prompt: its phase and its pages are the prompt's, and policies see it as a request like any
  other. The others follow: they hold nothing until the carrier has a place to decode, where pages and slots of all are
  reserved at once, and begin once the whole prompt is there. They share the carrier's full pages, and begin by copying
  its page with the prompt's last token. A carrier that ends before that hands the prompt on to a follower.

  Attributes:
    ids: All of them; the first is the request's own and stands for all where one is withdrawn or cancelled.
    living: Those that have not ended, by id.
    carrier: The one that carries the prompt, or did.
    following: Those that have not begun, by id.
  """

  ids: tuple[str, ...]
  living: dict[str, RequestState]
  carrier: RequestState
  following: dict[str, RequestState]


def enter(entry: RequestState, phase: Phase) -> None:
  """Move a request to another phase; every change of a phase goes through here."""
  assert phase in MOVES[entry.phase], f'{entry.request.id} is {entry.phase.value} and cannot be {phase.value}'
  entry.phase = phase


# ---------------------------------------------------------------------------- tokens and steps


def add_tokens(entry: RequestState, tokens: Sequence[int]) -> None:
  """Note tokens that came for a request alone."""
  entry.tokens.extend(tokens)
  if entry._rows is not None:
    assert entry.slot is not None
    entry._rows.skip(entry.slot, len(tokens))


def begin_steps(entry: RequestState, steps: Sequence[StepInFlight]) -> None:
  """Have a request decode where these steps are in flight."""
  entry._steps = steps


def leave_steps(entry: RequestState) -> None:
  """Have a request be in no step and no batch any more."""
  entry.joined, entry.parted, entry._steps = None, None, ()


def take_row(entry: RequestState, rows: TokenRows) -> None:
  """Let steps bring a request's tokens into the row of its slot, if it has none yet."""
  if entry._rows is None:
    assert entry.slot is not None
    entry._rows = rows
    rows.own(entry.slot, entry.limit - len(entry._tokens))


def give_up_row(entry: RequestState) -> None:
  """Take a request's tokens out of its row, which is nobody's then."""
  if entry._rows is not None:
    assert entry.slot is not None
    entry._tokens = entry.tokens
    entry._rows.disown(entry.slot)
    entry._rows = None
