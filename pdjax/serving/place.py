"""A worker as the books know it: what it has to give, what stands there, and its incarnation."""

import types
from collections import deque
from collections.abc import Mapping

from pdjax.serving.actions import Step
from pdjax.serving.page_allocator import PlacePages, Staging
from pdjax.serving.requests import RequestState
from pdjax.types.worker import Role, WorkerSpec


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
    wanted: Pages, by cache kind, that these would take if they were free.
    grows: Whether sequences take pages as they grow, and not all at once.
  """

  def __init__(self, pages: PlacePages, num_slots: int, staging_bytes: int, *, grows: bool = False):
    self.pages = pages
    self.grows = grows
    self.slots = deque(range(num_slots))
    self.staging_out, self.staging_in = Staging(staging_bytes), Staging(staging_bytes)
    self.steps: deque[tuple[int, Step]] = deque()
    self.prefilling: dict[str, RequestState] = {}
    self.decoding: dict[str, RequestState] = {}
    self.wanted: dict[str, int] = {}


class WorkerState:
  """The part of a worker's books that policies read too; only the files of `serving/` change it.

  Attributes:
    spec: The worker as the config has it.
    name: Its name.
    role: Its role now; `spec` has the one that it began with.
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
  """

  def __init__(self, spec: WorkerSpec, holdings: Holdings):
    assert spec.page_size is not None
    self.spec = spec
    self.name = spec.name
    self.role = spec.role
    self.draining: Role | None = None
    self.drains_from_s = 0.0
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
    return tuple(step for _, step in self._holdings.steps)

  @property
  def num_steps(self) -> int:
    """The number of steps in flight."""
    return len(self._holdings.steps)

  @property
  def free_pages(self) -> int:
    """Pages that nobody holds; of several cache kinds, the free memory in whole pages."""
    return self._holdings.pages.num_free

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
    if self._holdings.grows:
      return [name for name, entry in self._holdings.decoding.items() if entry.can_step]
    return [name for name, entry in self._holdings.decoding.items() if entry.tokens_left > 0]

  @property
  def is_short(self) -> bool:
    """Whether sequences here would decode and none can for want of pages, with no step under way to free some."""
    decoding = self._holdings.decoding.values()
    if not self._holdings.grows or self._holdings.steps or any(entry.can_step for entry in decoding):
      return False
    return any(entry.tokens_left > 0 for entry in decoding)
