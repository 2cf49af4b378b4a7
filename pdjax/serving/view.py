"""What policies look at: the requests, the workers, and what is free."""

import math
from collections.abc import Sequence

from pdjax.serving.orders import MAX_ORDERS
from pdjax.serving.place import WorkerState
from pdjax.serving.requests import RequestState
from pdjax.types.cluster import TransferSpec, WorkerSpec, ways, wire_dtype
from pdjax.types.model import ModelSpec


class Room:
  """A scratch view of what is free, so that one part of a decision cannot promise what another took."""

  def __init__(self, view: 'ClusterView'):
    self._view = view
    self._pages: dict[str, int] = {}
    self._slots: dict[str, int] = {}
    self._tokens: dict[str, int] = {}

  def pages(self, worker: str) -> int:
    """Free pages."""
    return self._view.workers[worker].allocator.num_free - self._pages.get(worker, 0)

  def slots(self, worker: str) -> int:
    """Free places among the sequences that decode at once."""
    return len(self._view.workers[worker].free_slots) - self._slots.get(worker, 0)

  def orders(self, worker: str) -> int:
    """Passes that may still be handed over; none to a worker that is lost."""
    place = self._view.workers[worker]
    return MAX_ORDERS - len(place.orders) if place.up else 0

  def queued_tokens(self, worker: str) -> int:
    """Prompt tokens the worker was given and has not finished."""
    return self._view.workers[worker].queued_tokens + self._tokens.get(worker, 0)

  def fits(self, request: str, worker: str, *, decodes: bool) -> bool:
    """Whether the worker has pages (and slots, if it decodes there) for the request and its further samples now."""
    if not self._view.workers[worker].up:
      return False
    needed = self._view.pages_needed(request, worker, decodes=decodes)
    return needed <= self.pages(worker) and (not decodes or self._view.slots_needed(request) <= self.slots(worker))

  def take(self, request: str, worker: str, *, decodes: bool) -> None:
    """Count the request's pages, and its slots if it decodes there, as taken."""
    self._pages[worker] = self._pages.get(worker, 0) + self._view.pages_needed(request, worker, decodes=decodes)
    if decodes:
      self._slots[worker] = self._slots.get(worker, 0) + self._view.slots_needed(request)

  def take_tokens(self, worker: str, tokens: int) -> None:
    """Count prompt tokens as given to the worker."""
    self._tokens[worker] = self._tokens.get(worker, 0) + tokens


class ClusterView:
  """The cluster as a policy may look at it.

  Attributes:
    model: The model served.
    transfer: How KV travels.
    workers: Each worker by name, in the order of the config.
    prefill_workers: Those that prefill.
    decode_workers: Those that decode.
    requests: Each unfinished request by id.
    waiting: Those that nothing was started of, in order of arrival.
    prefilled: Those whose prompt is computed and whose KV has nowhere to go yet, in order.
  """

  def __init__(self, model: ModelSpec, workers: Sequence[WorkerSpec], page_size: int, transfer: TransferSpec):
    """Start with every page free; see `ClusterState`."""
    self.model = model
    self.transfer = transfer
    self.workers: dict[str, WorkerState] = {}
    for spec in workers:
      if spec.name in self.workers:
        raise ValueError(f'two workers are named {spec.name!r}; give each a name of its own.')
      if not isinstance(spec.num_pages, int):
        raise ValueError(f"worker {spec.name!r} has num_pages='auto'; a backend replaces that by a count first.")
      self.workers[spec.name] = WorkerState(spec, spec.num_pages, spec.page_size or page_size, transfer.staging_bytes)
    self.prefill_workers = [worker for worker in self.workers.values() if worker.role.prefills]
    self.decode_workers = [worker for worker in self.workers.values() if worker.role.decodes]
    if not self.prefill_workers or not self.decode_workers:
      missing = 'prefills' if not self.prefill_workers else 'decodes'
      raise ValueError(f'no worker {missing}; give the cluster at least one that does, or one with role "both".')
    self._check_staging()
    self.requests: dict[str, RequestState] = {}
    self.waiting: dict[str, RequestState] = {}
    self.prefilled: dict[str, RequestState] = {}

  def _check_staging(self) -> None:
    for pair in ways([worker.spec for worker in self.workers.values()]):
      source, target = (self.workers[spec.name] for spec in pair)
      if (needed := self.unit_bytes(source, target)) > self.transfer.staging_bytes:
        raise ValueError(
          f'staging_bytes is {self.transfer.staging_bytes}, but one unit of {self.unit(source, target)} tokens from '
          f'{source.name!r} to {target.name!r} has {needed} bytes; raise TransferSpec.staging_bytes.'
        )

  def room(self) -> Room:
    """A fresh scratch view of what is free."""
    return Room(self)

  def pages_needed(self, request: str, worker: str, *, decodes: bool) -> int:
    """Pages of a worker for the prompt, and with `decodes` for all the tokens it may generate but the last.

    With further samples that follow it, theirs too: all but those of the prompt's full pages.
    """
    entry, place = self.requests[request], self.workers[worker]
    whole = self.whole_pages(entry, place, decodes=decodes)
    return whole + (self.slots_needed(request) - 1) * (whole - self.shared_pages(entry, place)) if decodes else whole

  def slots_needed(self, request: str) -> int:
    """Slots where it decodes: one, and one for each further sample that follows it."""
    samples = self.requests[request].samples
    return 1 if samples is None or samples.carrier.request.id != request else 1 + len(samples.following)

  def whole_pages(self, entry: RequestState, worker: WorkerState, *, decodes: bool) -> int:
    """Pages of a worker for one sequence."""
    tokens = entry.request.prompt_len + entry.limit - 1 if decodes else entry.prefill_len
    return -(-tokens // worker.page_size)

  def shared_pages(self, entry: RequestState, worker: WorkerState) -> int:
    """Pages that samples share: all before the one of the prompt's last token, which each of them writes."""
    return (entry.request.prompt_len - 1) // worker.page_size

  def unit(self, source: WorkerState, target: WorkerState) -> int:
    """Tokens of the largest piece that pages of both are made of."""
    return math.gcd(source.page_size, target.page_size)

  def unit_bytes(self, source: WorkerState, target: WorkerState) -> int:
    """Bytes of such a piece while it travels."""
    ours, theirs = (worker.spec.kv_dtype or 'float32' for worker in (source, target))
    return self.unit(source, target) * self.model.cached_token_bytes(wire_dtype(ours, theirs))
