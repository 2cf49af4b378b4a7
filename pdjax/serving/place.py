"""A worker as the books know it: its pages and slots, the requests there, and its incarnation."""

from collections import deque

from pdjax.serving.orders import StepOrder
from pdjax.serving.page_allocator import PageAllocator, Staging
from pdjax.serving.requests import RequestState
from pdjax.types.cluster import WorkerSpec


class Holdings:
  """The pages, slots and staging of a place, to be taken and given back.

  Attributes:
    pages: Its pages.
    slots: Slots that are free, the one to take next first.
    staging_out: Bytes for what is on its way from here.
    staging_in: Bytes for what is on its way to here.
  """

  def __init__(self, num_pages: int, num_slots: int, staging_bytes: int):
    self.pages = PageAllocator(num_pages)
    self.slots = deque(range(num_slots))
    self.staging_out, self.staging_in = Staging(staging_bytes), Staging(staging_bytes)


class WorkerState:
  """One worker in the books; only the files of `serving/` change it.

  Attributes:
    spec: The worker as the config has it.
    name: Its name.
    role: The phases it runs.
    page_size: Tokens per page.
    num_pages: Pages in all, free or not.
    orders: Steps in flight, oldest first.
    prefilling: Prompts begun here with tokens left to hand over, in order.
    decoding: Sequences in its slots.
    queued_tokens: Prompt tokens of requests begun here that are not computed yet.
    incarnation: The number of its incarnation, from 1; the backend tells when another begins.
    up: Whether it takes orders: it was not lost, or is back.
    lost: The error it was lost with; empty while it is up.
    given_up: Whether nobody waits for it to come back any more.
  """

  def __init__(self, spec: WorkerSpec, page_size: int, holdings: Holdings):
    self.spec = spec
    self.name = spec.name
    self.role = spec.role
    self.page_size = page_size
    self.num_pages = holdings.pages.num_pages
    self._holdings = holdings
    self.orders: deque[StepOrder] = deque()
    self.prefilling: dict[str, RequestState] = {}
    self.decoding: dict[str, RequestState] = {}
    self.queued_tokens = 0
    self.incarnation = 1
    self.up = True
    self.lost = ''
    self.given_up = False

  @property
  def free_pages(self) -> int:
    """Pages that nobody holds."""
    return self._holdings.pages.num_free

  @property
  def free_slots(self) -> int:
    """Slots in which no sequence stands."""
    return len(self._holdings.slots)

  def decodable(self) -> list[str]:
    """Sequences that another decode step can bring a token."""
    return [name for name, entry in self.decoding.items() if entry.tokens_left > 0]
