"""A worker as the books know it: its pages, its slots, the steps in flight, and which of its lives this is."""

from collections import deque

from pdjax.serving.orders import StepOrder
from pdjax.serving.page_allocator import PageAllocator, Staging
from pdjax.serving.requests import RequestState
from pdjax.types.cluster import WorkerSpec


class WorkerState:
  """What the cluster knows of one worker.

  Attributes:
    page_size: Tokens per page.
    allocator: Its pages.
    staging_out: Bytes for what is on its way from here.
    staging_in: Bytes for what is on its way to here.
    free_slots: Places free among the sequences that decode at once.
    orders: Passes in flight, oldest first.
    prefilling: Prompts begun here with tokens left to hand over, in order.
    decoding: Sequences in its slots.
    queued_tokens: Prompt tokens of requests begun here that are not computed yet.
    incarnation: Which of its lives this is; the backend says when another begins.
    up: Whether it takes orders: it was not lost, or is back.
    lost: Why it is not up.
    given_up: Whether nobody waits for it to come back any more.
  """

  def __init__(self, spec: WorkerSpec, num_pages: int, page_size: int, staging_bytes: int):
    self.spec = spec
    self.name = spec.name
    self.page_size = page_size
    self.role = spec.role
    self.allocator = PageAllocator(num_pages)
    self.staging_out, self.staging_in = Staging(staging_bytes), Staging(staging_bytes)
    self.free_slots = deque(range(spec.max_sequences))
    self.orders: deque[StepOrder] = deque()
    self.prefilling: dict[str, RequestState] = {}
    self.decoding: dict[str, RequestState] = {}
    self.queued_tokens = 0
    self.incarnation = 1
    self.up = True
    self.lost = ''
    self.given_up = False

  @property
  def num_pages(self) -> int:
    """Pages in all, free or not."""
    return self.allocator.num_pages

  def decodable(self) -> list[str]:
    """Sequences that another decode step can bring a token."""
    return [name for name, entry in self.decoding.items() if entry.tokens_left > 0]
