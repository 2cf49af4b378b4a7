"""Filling one step of each worker with prompt chunks, in an order of one's choice: what both policies share."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

from pdjax.policies.admission import Admission
from pdjax.policies.deciders import Decider
from pdjax.policies.fetching import fetch_for
from pdjax.policies.placement import Placement
from pdjax.serving.actions import Chunk, Preempt, Reject, Transfer
from pdjax.serving.view import ClusterView, RequestView, Room, WorkerView


class ChunkBatches:
  """The chunks of the next step of each worker, within its limits and a token budget."""

  def __init__(self, workers: Sequence[WorkerView], budgets: dict[str, int]):
    self.chunks: dict[str, list[Chunk]] = {worker.name: [] for worker in workers}
    self._budgets = {worker.name: min(budgets[worker.name], worker.spec.max_step_tokens) for worker in workers}
    self._open = [worker for worker in workers if self.takes_more(worker)]

  def open(self) -> Sequence[WorkerView]:
    """Workers whose step can take another chunk."""
    return self._open

  def takes_more(self, worker: WorkerView) -> bool:
    """Whether the worker's step can take another chunk."""
    return self._budgets[worker.name] > 0 and len(self.chunks[worker.name]) < worker.spec.max_chunks

  def close(self, workers: Sequence[WorkerView]) -> None:
    """Let the steps of some workers take no more: another prompt waits for them."""
    self._open = [worker for worker in self._open if worker not in workers]

  def add(self, entry: RequestView, worker: WorkerView, send_to: str | None, start: int) -> None:
    """Add as much of a prompt from a token on as the budget allows."""
    length = min(entry.prefill_len - start, self._budgets[worker.name])
    self._budgets[worker.name] -= length
    self.chunks[worker.name].append(Chunk(entry.request.id, start, length, send_to))
    if not self.takes_more(worker):
      self._open = [other for other in self._open if other is not worker]


@dataclasses.dataclass(frozen=True)
class Prefills:
  """The prompts to be prefilled next, and what is to be fetched for others.

  Attributes:
    chunks: The chunks of one step of each worker, by its name; an empty list where there is nothing to do.
    fetches: The copies of cached blocks that prompts wait for before they begin.
    rejections: Requests that are not to be served.
  """

  chunks: dict[str, list[Chunk]]
  fetches: list[Transfer]
  rejections: list[Reject]


def fill_prefills(
  view: ClusterView,
  room: Room,
  workers: Sequence[WorkerView],
  budgets: dict[str, int],
  waiting: Iterable[RequestView],
  placement: Placement,
  target_of: Callable[[RequestView, WorkerView], str | None],
  min_fetch: int = 1,
  decider: Decider | None = None,
  admission: Admission | None = None,
) -> Prefills:
  """Chunks for one step of each worker: prompts begun there first, then waiting ones in the order given.

  A waiting request that fits no worker is overtaken at none of those that it could go to, so that a long prompt does
  not wait for ever. A prompt of which another place holds more than its worker is fetched from there first, and others
  go before it meanwhile.

  Args:
    view: The cluster.
    room: The free pages and slots; those taken here are counted there.
    workers: Those that may take a step now.
    budgets: Most prompt tokens of the step, by worker.
    waiting: Requests not begun, in the order to serve them.
    placement: Chooses among workers that can take a request.
    target_of: Names the worker to which a request's KV is to travel from that worker, or None to stay.
    min_fetch: Fewest tokens of a prompt that are fetched from another place.
    decider: Says which of the workers may prefill a request; None for all.
    admission: Says who of those that wait is not to be served.
  """
  fetches: list[Transfer] = []
  rejections: list[Reject] = []
  everywhere = [worker for worker in view.prefill_workers if worker.up and not worker.draining]
  room.plan_steps(budgets)
  batches = ChunkBatches(workers, budgets)
  for worker in workers:
    for entry in worker.prefilling.values():
      if not batches.takes_more(worker):
        break
      batches.add(entry, worker, entry.target if entry.target != worker.name else None, entry.started)
  for entry in waiting:
    request = entry.request.id
    if entry.fetching:  # what it needs is kept for it
      for worker in [worker for worker in workers if worker.name in entry.copies_asked][:1]:
        room.take(request, worker.name, decodes=worker.role.decodes and target_of(entry, worker) is None)
      continue
    if not batches.open():
      break
    if admission is not None:
      refusal = admission.refusal(entry, everywhere, room, view.now_s - entry.request.arrival_s)
      if refusal is not None:
        rejections.append(Reject(request, refusal))
        continue
    wanted = batches.open() if decider is None else decider.where(entry, everywhere, room)
    open_workers = [worker for worker in batches.open() if worker in wanted]
    targets = {worker.name: target_of(entry, worker) for worker in open_workers}
    staying = [worker for worker in open_workers if targets[worker.name] is None and worker.role.decodes]
    if staying:
      leaving = [worker for worker in open_workers if worker not in staying]
      fits = [*room.fitting(request, leaving, decodes=False), *room.fitting(request, staying, decodes=True)]
      able = [worker for worker in open_workers if worker in fits]
    else:
      able = room.fitting(request, open_workers, decodes=False)
    if not able:
      batches.close(wanted)
      first = wanted[0].name
      room.take_tokens(first, entry.prefill_len - view.cached_tokens(request, first))
      continue
    able = [worker for worker in able if worker.name in entry.copies_asked] or able
    worker = placement.choose(entry, able, room)
    if (fetch := fetch_for(view, entry, worker, min_fetch)) is not None:
      fetches.append(fetch)
      room.take(request, worker.name, decodes=worker in staying)
      continue
    send_to = targets[worker.name]
    room.take(request, worker.name, decodes=worker in staying)
    if send_to is not None:
      room.take(request, send_to, decodes=True)
    cached = view.cached_tokens(request, worker.name)
    batches.add(entry, worker, send_to, cached)
    room.take_tokens(worker.name, entry.prefill_len - cached)
  return Prefills(batches.chunks, fetches, rejections)


def decodes_any(worker: WorkerView) -> bool:
  """Whether a step of all sequences of a worker decodes any."""
  return worker.is_standing or worker.has_work


def preempt_newest(view: ClusterView) -> list[Preempt]:
  """A request to preempt on each worker where sequences lack pages and none can go on: the last that came.

  So the oldest always goes on, and what is thrown away is little (as in vLLM, Kwon et al. 2023).
  """
  found = []
  for worker in view.decode_workers:
    if worker.up and worker.is_short:
      able = [entry for entry in worker.decoding.values() if entry.preemptions < view.max_preemptions]
      if able:
        found.append(Preempt(max(able, key=lambda entry: entry.number).request.id))
  return found
