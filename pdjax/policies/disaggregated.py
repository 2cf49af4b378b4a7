"""First come, first served over prefill workers and decode workers, with the KV travelling between them."""

import dataclasses
from collections.abc import Iterable

from pdjax.policies.base import PolicyBase
from pdjax.policies.batching import fill_prefills, require_positive
from pdjax.policies.placement import FewestQueuedTokens, MostFreeSlots, Placement
from pdjax.serving.actions import ALL, Action, Step, Transfer
from pdjax.serving.place import WorkerState
from pdjax.serving.requests import RequestState
from pdjax.serving.state import ClusterState
from pdjax.serving.view import Room


@dataclasses.dataclass(frozen=True)
class Disaggregated(PolicyBase):
  """Prefill in arrival order; decode everything a decode worker holds (DistServe, Zhong et al. 2024).

  A prompt's KV travels chunk by chunk while the prompt is computed, if a decode worker has room when it begins;
  otherwise it waits on its prefill worker, first token delivered, until one has. Override `order` to serve waiting
  prompts in another order.

  Attributes:
    max_prefill_tokens: Most prompt tokens of one pass, over all the prompts packed in it.
    decode_steps: Decode steps fused on the device between two decisions.
    place_prefill: Chooses the prefill worker.
    place_decode: Chooses the decode worker.
  """

  max_prefill_tokens: int = 512
  decode_steps: int = 1
  place_prefill: Placement = FewestQueuedTokens()
  place_decode: Placement = MostFreeSlots()

  def __post_init__(self):
    require_positive(self, 'max_prefill_tokens', 'decode_steps')

  def decide(self, state: ClusterState) -> list[Action]:
    room = state.room()
    transfers = self._transfers(state, room)
    prefills = self._prefills(state, room)
    return [*transfers, *prefills, *self._decodes(state, room, {step.worker for step in prefills})]

  def order(self, waiting: Iterable[RequestState]) -> Iterable[RequestState]:
    """The waiting prompts in the order to serve them."""
    return waiting

  def _transfers(self, state: ClusterState, room: Room) -> list[Action]:
    actions: list[Action] = []
    for request in state.prefilled:
      target = self._target(state, room, request)
      if target is None:
        break
      room.take(request, target, decodes=True)
      actions.append(Transfer(request, target))
    return actions

  def _target(self, state: ClusterState, room: Room, request: str) -> str | None:
    able = [worker for worker in state.decode_workers if room.fits(request, worker.name, decodes=True)]
    return self.place_decode.choose(able, room).name if able else None

  def _prefills(self, state: ClusterState, room: Room) -> list[Step]:
    workers = [worker for worker in state.prefill_workers if room.orders(worker.name) > 0]
    if not workers or not (state.waiting or any(worker.prefilling for worker in workers)):
      return []

    def target_of(entry: RequestState, worker: WorkerState) -> str | None:
      if entry.limit == 1 or state.prefilled:  # nothing to decode; or others have waited longer for the room
        return None
      target = self._target(state, room, entry.request.id)
      return None if target == worker.name else target

    budgets = {worker.name: self.max_prefill_tokens for worker in workers}
    waiting = self.order(state.waiting.values())
    chunks = fill_prefills(state, room, workers, budgets, waiting, self.place_prefill, target_of)
    return [
      Step(worker, tuple(batch), ALL if state.workers[worker].decodable() else ())  # a worker of both roles fuses
      for worker, batch in chunks.items()
      if batch
    ]

  def _decodes(self, state: ClusterState, room: Room, busy: set[str]) -> list[Step]:
    return [
      Step(worker.name, decodes=ALL, steps=self.decode_steps)
      for worker in state.decode_workers
      if worker.name not in busy and room.orders(worker.name) > 0 and worker.decodable()
    ]
