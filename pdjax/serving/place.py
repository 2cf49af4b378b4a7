"""A worker as the books know it: what it has to give, what stands there, and its incarnation."""

import types
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from pdjax.cost.worker_cost import WorkerCost
from pdjax.serving.actions import Step
from pdjax.serving.batch import NOBODY, Joining, TokenRows
from pdjax.serving.page_allocator import PlacePages, Staging
from pdjax.serving.requests import RequestState, StepInFlight, begin_steps, take_row
from pdjax.types.worker import Role, WorkerSpec


class Decoding:
  """The sequences in a worker's slots, and which of them stand in the batch that its steps decode.

  Attributes:
    entries: All of them, by id.
    rows: Their tokens, by slot.
    batch: The batch as of the last order.
    members: Those in it that have not left, by slot.
    outside: Those that are not in it, by id: the next step of all takes in who can go on.
    leaves: Slots of the batch whose sequences left since the last order.
    grown: Those in the batch that got pages since the last order, by slot.
    leaving: Those that begin again once steps in flight have ended, by id.
    standing: The order that stands until something changes; None if there is none.
  """

  def __init__(self, num_slots: int, changed: Callable[[], None]):
    """Begin with nobody there.

    Args:
      num_slots: Its slots.
      changed: Told whenever somebody comes, can go on or leaves.
    """
    self._changed = changed
    self.entries: dict[str, RequestState] = {}
    self.rows = TokenRows(num_slots)
    self.batch = NOBODY
    self.members: dict[int, RequestState] = {}
    self.outside: dict[str, RequestState] = {}
    self.leaves: list[int] = []
    self.grown: dict[int, RequestState] = {}
    self.leaving: dict[str, RequestState] = {}
    self.standing: int | None = None

  def has(self, request: str) -> bool:
    """Whether a request is in the batch."""
    return request in self.entries and request not in self.outside

  def enter(self, entry: RequestState, steps: Sequence[StepInFlight]) -> None:
    """A sequence begins to decode here."""
    name = entry.request.id
    self.entries[name] = self.outside[name] = entry
    self._changed()
    begin_steps(entry, steps)

  def join(self, entry: RequestState, order: int) -> None:
    """Take a sequence into the batch of an order."""
    assert entry.slot is not None
    del self.outside[entry.request.id]
    self.members[entry.slot] = entry
    entry.joined, entry.parted = order, None
    take_row(entry, self.rows)

  def pause(self, entry: RequestState, order: int) -> None:
    """Take a sequence out of the batch of an order and those behind it, until it joins again."""
    assert entry.slot is not None
    del self.members[entry.slot]
    self.grown.pop(entry.slot, None)
    self.leaves.append(entry.slot)
    entry.parted = order
    self.outside[entry.request.id] = entry

  def part(self, entry: RequestState, order: int) -> bool:
    """Let a sequence decode no more, in orders from this one on; return whether it was in the batch."""
    if self.entries.pop(entry.request.id, None) is None:
      return False
    was_member = entry.request.id not in self.outside
    if was_member:
      self.pause(entry, order)
    del self.outside[entry.request.id]
    self._changed()
    return was_member

  def note_growth(self, entry: RequestState) -> None:
    """Note that a sequence got pages, which the next order is to say."""
    if entry.slot is not None and self.members.get(entry.slot) is entry:
      self.grown[entry.slot] = entry

  def change(self, joins: Sequence[Joining]) -> tuple[int, ...]:
    """Let the batch be without those that left, and with these; the slots of those that left."""
    leaves, self.leaves = tuple(self.leaves), []
    self.batch = self.batch.changed(leaves, joins)
    return leaves

  def stand(self, order: int, catch_up: Callable[[], None] | None) -> None:
    """Let an order stand; with `catch_up` the backend may be asked how far it is."""
    self.standing, self.rows.catch_up = order, catch_up

  def lose(self) -> None:
    """Forget the batch: the worker has another incarnation, or none."""
    for slot in list(self.members):
      entry = self.members.pop(slot)
      self.outside[entry.request.id] = entry
      entry.parted = entry.joined
    self.batch, self.leaves = NOBODY, []
    self.grown.clear()
    self.standing = self.rows.catch_up = None


class Holdings:
  """The part of a worker's books that only the books see: what can be taken there, and what is there now.

  Attributes:
    pages: Its pages.
    slots: Slots that are free, the one to take next first.
    staging_out: Bytes for what is on its way from here.
    staging_in: Bytes for what is on its way to here.
    steps: Steps in flight with the ids of their orders, oldest first.
    prefilling: Prompts begun here with tokens left to hand over, in order.
    decoding: Sequences in its slots.
    batch: The same, and those of them that its steps decode.
    wanted: Pages, by cache kind, that these would take if they were free.
    grows: Whether sequences take pages as they grow, and not all at once.
  """

  def __init__(
    self, pages: PlacePages, num_slots: int, staging_bytes: int, changed: Callable[[], None], *, grows: bool = False
  ):
    self.pages = pages
    self.grows = grows
    self.slots = deque(range(num_slots))
    self.staging_out, self.staging_in = Staging(staging_bytes), Staging(staging_bytes)
    self.steps: deque[StepInFlight] = deque()
    self.prefilling: dict[str, RequestState] = {}
    self.batch = Decoding(num_slots, changed)
    self.decoding = self.batch.entries
    self.wanted: dict[str, int] = {}


class WorkerState:
  """The part of a worker's books that policies read too; only the files of `serving/` change it.

  Attributes:
    number: Its position in the config.
    spec: The worker as the config has it.
    cost: Its own cost model.
    name: Its name.
    role: Its role now; `spec` has the one that it began with.
    ever_prefills: Whether it prefills in any of its roles.
    ever_decodes: Whether it decodes in any of its roles.
    draining: The role that it is to have once it is empty; until then it takes no new request. None if it keeps its
      own.
    page_size: Tokens per page.
    num_pages: Pages in all, free or not.
    prefilling: Prompts begun here with tokens left to hand over, in order.
    decoding: Sequences in its slots.
    queued_tokens: Prompt tokens of requests begun here that are not computed yet.
    incarnation: The number of its incarnation; the backend says when another begins.
    up: Whether it takes orders: it was not lost, or is back.
    lost: The reason why it is not up.
    given_up: Whether nobody waits for it to come back any more.
    drains_from_s: The time from which on it has been draining, if it is.
    role_since_s: The time from which on it has had its role.
  """

  def __init__(self, spec: WorkerSpec, holdings: Holdings, number: int, cost: WorkerCost):
    assert spec.page_size is not None
    self.number = number
    self.spec = spec
    self.cost = cost
    self.name = spec.name
    self.role = spec.role
    self.ever_prefills, self.ever_decodes = spec.ever_prefills, spec.ever_decodes
    self.draining: Role | None = None
    self.drains_from_s = self.role_since_s = 0.0
    self.page_size = spec.page_size
    self.num_pages = holdings.pages.num_pages
    self._holdings = holdings
    self.prefilling: Mapping[str, RequestState] = types.MappingProxyType(holdings.prefilling)
    self.decoding: Mapping[str, RequestState] = types.MappingProxyType(holdings.decoding)
    self.queued_tokens = 0
    self.incarnation = 1
    self.up = True
    self.lost = ''
    self.given_up = False

  @property
  def steps(self) -> tuple[Step, ...]:
    """Steps in flight, oldest first, as the policy asked for them."""
    return tuple(one.step for one in self._holdings.steps)

  @property
  def num_steps(self) -> int:
    """The number of steps in flight."""
    return len(self._holdings.steps)

  @property
  def free_pages(self) -> int:
    """Pages that nobody holds; of several cache kinds, the free memory in whole pages."""
    return self._holdings.pages.num_free

  @property
  def cached_pages(self) -> int:
    """Pages that nobody holds and whose content is found again; they count as free."""
    return self._holdings.pages.num_cached

  @property
  def used_bytes(self) -> int:
    """Bytes of the cache that somebody holds, over all devices, copies counted once."""
    return self._holdings.pages.used_bytes

  @property
  def num_bytes(self) -> int:
    """Bytes of the cache in all, held or not, over all devices, copies counted once."""
    return self._holdings.pages.num_bytes

  @property
  def free_slots(self) -> int:
    """Slots in which no sequence stands."""
    return len(self._holdings.slots)

  @property
  def is_empty(self) -> bool:
    """Whether nothing is left here: no page is held, for a request or for a transfer, and no step is in flight."""
    return not self._holdings.steps and not self._holdings.pages.used_bytes

  def decodable(self) -> list[str]:
    """Sequences that another decode step can bring a token, and that have a page for it."""
    return [name for name, entry in self._holdings.decoding.items() if entry.can_step]

  @property
  def has_work(self) -> bool:
    """Whether another step can bring a sequence a token that no step in flight brings it."""
    batch = self._holdings.batch
    if any(entry.can_step for entry in batch.outside.values()):
      return True
    return batch.standing is None and any(entry.can_step for entry in batch.members.values())

  @property
  def is_standing(self) -> bool:
    """Whether a standing step goes on here until something changes."""
    batch = self._holdings.batch
    return batch.standing is not None and bool(batch.members)

  @property
  def is_short(self) -> bool:
    """Whether sequences here would decode and none can for want of pages, with no step in flight to free some."""
    decoding = self._holdings.decoding.values()
    if not self._holdings.grows or self._holdings.steps or any(entry.can_step for entry in decoding):
      return False
    return any(entry.tokens_left > 0 for entry in decoding)
