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

  def is_open(self, worker: WorkerView) -> bool:
    """Whether a worker's step can take another chunk, and no other prompt waits for it."""
    return worker in self._open

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
  everyone: Sequence[WorkerView] | None = None,
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
    decider: Says which of the workers may prefill a request, if some also decode and others do not; None for all.
    admission: Says who of those that wait, and were never begun, is not to be served.
    everyone: Workers that may prefill at all, with a step now or later; None for all that do.
  """
  fetches: list[Transfer] = []
  rejections: list[Reject] = []
  if not workers:
    return Prefills({}, fetches, rejections)
  everywhere: Sequence[WorkerView] = ()
  local: Sequence[WorkerView] = ()
  remote: Sequence[WorkerView] = ()
  if decider is not None or admission is not None:
    able = view.prefill_workers if everyone is None else everyone
    everywhere = taking_new(able)
    local, remote = ([one for one in everywhere if one.role.decodes == decodes] for decodes in (True, False))
  if not local or not remote:
    decider = None
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
    if admission is not None and everywhere and is_new(entry):
      refusal = admission.refusal(entry, everywhere, room, view.now_s - entry.request.arrival_s)
      if refusal is not None:
        rejections.append(Reject(request, refusal))
        continue
    wanted = open_workers = batches.open()
    if decider is not None:
      wanted = decider.where(entry, local, remote, room)
      open_workers = [worker for worker in wanted if batches.is_open(worker)]
    targets: dict[str, str | None] = {}

    def stays(worker: WorkerView, entry: RequestView = entry, targets: dict[str, str | None] = targets) -> bool:
      targets[worker.name] = target_of(entry, worker)
      return targets[worker.name] is None and worker.role.decodes

    asked = [one for one in open_workers if one.name in entry.copies_asked] if entry.copies_asked else ()
    chosen = placed(entry, asked, placement, room, stays)  # what came of the copies is there
    chosen = placed(entry, open_workers, placement, room, stays) if chosen is None else chosen
    if chosen is None and decider is not None and not _may_ever_fit(view, request, wanted):
      others = [one for one in everywhere if one not in wanted]
      wanted = others or wanted  # a rule must not make it wait for ever
      open_workers = [worker for worker in wanted if batches.is_open(worker)]
      chosen = placed(entry, open_workers, placement, room, stays)
    if chosen is None:
      batches.close(wanted)
      first = wanted[0].name
      room.take_tokens(first, entry.prefill_len - view.cached_tokens(request, first))
      continue
    send_to = targets[chosen.name]
    decodes = send_to is None and chosen.role.decodes
    room.take(request, chosen.name, decodes=decodes)
    if (fetch := fetch_for(view, entry, chosen, min_fetch)) is not None:
      fetches.append(fetch)
      room.take_tokens(chosen.name, entry.prefill_len - room.fetchable_tokens(request, chosen.name)[0])
      continue
    if send_to is not None:
      room.take(request, send_to, decodes=True)
    cached = view.cached_tokens(request, chosen.name)
    batches.add(entry, chosen, send_to, cached)
    room.take_tokens(chosen.name, entry.prefill_len - cached)
  return Prefills(batches.chunks, fetches, rejections)


def _may_ever_fit(view: ClusterView, request: str, workers: Iterable[WorkerView]) -> bool:
  slots = view.slots_needed(request)
  able = (one for one in workers if not one.role.decodes or one.spec.max_sequences >= slots)
  return any(view.could_fit(request, one.name, decodes=one.role.decodes) for one in able)


def taking_new(workers: Iterable[WorkerView]) -> list[WorkerView]:
  """Those of some workers that take new requests: they are up and keep their role."""
  return [worker for worker in workers if worker.up and not worker.draining]


def is_new(entry: RequestView) -> bool:
  """Whether nothing was spent on a request yet: it was never begun, nor preempted."""
  return entry.attempts == 1 and not entry.preemptions and not entry.num_tokens


def placed(
  entry: RequestView,
  workers: Sequence[WorkerView],
  placement: Placement,
  room: Room,
  decodes: Callable[[WorkerView], bool] = lambda worker: True,
) -> WorkerView | None:
  """The worker that a placement chooses for a request, of those that have room for it; None if none has.

  The one that it would choose of all mostly has, and then no other is looked at.
  """
  if not workers:
    return None
  request = entry.request.id
  first = placement.choose(entry, workers, room)
  if room.fits(request, first.name, decodes=decodes(first)):
    return first
  able = [one for one in workers if one is not first and room.fits(request, one.name, decodes=decodes(one))]
  return placement.choose(entry, able, room) if able else None


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
