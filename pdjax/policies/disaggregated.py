"""First come, first served over prefill workers and decode workers, with the KV travelling between them."""

import dataclasses
from collections.abc import Callable, Iterable

from pdjax.policies.admission import Admission
from pdjax.policies.base import PolicyBase
from pdjax.policies.batching import decodes_any, fill_prefills, placed, preempt_newest, taking_new
from pdjax.policies.deciders import Decider
from pdjax.policies.fetching import keep_ended
from pdjax.policies.order import Order
from pdjax.policies.placement import FewestQueuedTokens, MostFreeSlots, Placement
from pdjax.serving.actions import ALL, STANDING, Action, Step, Transfer
from pdjax.serving.view import ClusterView, RequestView, Room, WorkerView
from pdjax.types.checked import Count, check_fields
from pdjax.types.request import Request


@dataclasses.dataclass(frozen=True)
class Disaggregated(PolicyBase):
  """Prefill in arrival order; decode everything a decode worker holds (DistServe, Zhong et al. 2024).

  A prompt's KV travels chunk by chunk while the prompt is computed, if a decode worker has room when it begins;
  otherwise it waits on its prefill worker, first token delivered, until one has. Its parts are objects that anybody can
  write: an order, placements, a decider, an admission.

  Attributes:
    max_prefill_tokens: Most prompt tokens of one step, over all the prompts packed in it.
    decode_steps: Decode steps fused on the device between two decisions; with 1, a step stands until something changes.
    place_prefill: Chooses the prefill worker.
    place_decode: Chooses the decode worker.
    returns_to: The place to which the blocks of requests that have ended are copied, a worker or one that only holds
      pages, or 'source' for the worker that prefilled each; None leaves them where they are.
    min_fetch: Fewest tokens of a prompt that are fetched from another place before it begins.
    order_by: The order of requests that wait; None for that of arrival.
    decider: Says whether a prompt is computed where it decodes, on a worker of role 'both', or on one that only
      prefills; None for wherever `place_prefill` says.
    admission: Says which requests are rejected instead; None for none.
    moves_on: Whether sequences that decode on a worker that drains for another role are moved to others. Then, and
      where blocks return to a worker, there are ways between all places, so that prompts are fetched from any.
  """

  max_prefill_tokens: Count = 512
  decode_steps: Count = 1
  place_prefill: Placement = FewestQueuedTokens()
  place_decode: Placement = MostFreeSlots()
  returns_to: str | None = None
  min_fetch: Count = 1
  moves_on: bool = False
  order_by: Order | None = None
  decider: Decider | None = None
  admission: Admission | None = None

  def __post_init__(self):
    check_fields(self)

  @property
  def moves_anywhere(self) -> bool:  # type: ignore[override]
    """Whether it sends KV back from workers that decode, or between these."""
    return self.moves_on or self.returns_to == 'source'

  @property
  def waiting_key(self) -> Callable[[Request], tuple[float, ...]] | None:  # type: ignore[override]
    """The key of `order_by`, if there is one."""
    return None if self.order_by is None else self.order_by.key

  def decide(self, view: ClusterView) -> list[Action]:
    if view.grows and (preempted := preempt_newest(view)):
      return [*preempted]
    kept = [*keep_ended(view, self.returns_to)]
    if not (view.prefilled or view.waiting or view.begun or self.moves_on):
      return [*self._decodes(view, set()), *kept]
    room = view.room()
    transfers = self._transfers(view, room)
    if self.moves_on and (moves := self._moves(view, room)):
      return [*transfers, *moves]  # their workers have others to decode now
    prefills, others = self._prefills(view, room)
    return [*transfers, *others, *prefills, *self._decodes(view, {step.worker for step in prefills}), *kept]

  def order(self, waiting: Iterable[RequestView]) -> Iterable[RequestView]:
    """The waiting prompts in the order to serve them."""
    return waiting

  def target_of(self, view: ClusterView, room: Room, entry: RequestView, worker: WorkerView) -> str | None:
    """The worker to which a prompt's KV travels while `worker` prefills it; None lets it stay there for now.

    It is asked of the worker that `place_prefill` chooses, and of others where that has no room. Override it to decide
    where a prompt goes on; a worker of role 'both' decodes what stays, and what stays on another is moved once
    it is computed, to where `place_decode` says.
    """
    if self.decider is not None and worker.role.decodes and any(map(_only_prefills, view.prefill_workers)):
      return None  # it was to be computed where it decodes
    if entry.limit == 1 or view.prefilled:  # nothing to decode; or others have waited longer for the room
      return None
    target = room.kept(('target', entry.request.id), lambda: self._target(view, room, entry))
    return None if target == worker.name else target

  def _transfers(self, view: ClusterView, room: Room) -> list[Action]:
    actions: list[Action] = []
    for request, entry in view.prefilled.items():
      target = self._target(view, room, entry)
      if target is None:
        if workers := taking_new(
          view.decode_workers
        ):  # what comes free there is kept for it, and not taken by prompts that begin there
          room.take(request, self.place_decode.choose(entry, workers, room).name, decodes=True)
        break
      room.take(request, target, decodes=True)
      actions.append(Transfer(request, target))
    return actions

  def _moves(self, view: ClusterView, room: Room) -> list[Action]:
    """The moves of what decodes on workers that will decode no more, as far as others have room."""
    actions: list[Action] = []
    draining = [worker for worker in view.decode_workers if worker.draining and not worker.draining.decodes]
    for entry in [entry for worker in draining for entry in worker.decoding.values() if entry.can_move]:
      if (target := self._target(view, room, entry)) is None:
        break
      room.take(entry.request.id, target, decodes=True)
      actions.append(Transfer(entry.request.id, target))
    return actions

  def _target(self, view: ClusterView, room: Room, entry: RequestView) -> str | None:
    # One that drains takes only what it has already, and that where there is no other.
    target = placed(entry, taking_new(view.decode_workers) or view.decode_workers, self.place_decode, room)
    return None if target is None else target.name

  def _prefills(self, view: ClusterView, room: Room) -> tuple[list[Step], list[Action]]:
    """The steps with prompts, and what is to be done before them."""
    if not view.waiting and not view.begun:
      return [], []
    workers = view.able_to_prefill
    if not workers:
      return [], []

    def target_of(entry: RequestView, worker: WorkerView) -> str | None:
      return self.target_of(view, room, entry, worker)

    budgets = {worker.name: self.max_prefill_tokens for worker in view.prefill_workers}
    prefills = fill_prefills(
      view, room, workers, budgets, self.order(view.waiting.values()), self.place_prefill, target_of, self.min_fetch,
      self.decider, self.admission,
    )  # fmt: skip
    steps = [
      Step(worker, tuple(batch), ALL if decodes_any(view.workers[worker]) else ())  # a worker of both roles fuses
      for worker, batch in prefills.chunks.items()
      if batch
    ]
    return steps, [*prefills.rejections, *prefills.fetches]

  def _decodes(self, view: ClusterView, busy: set[str]) -> list[Step]:
    return [
      Step(worker.name, decodes=ALL, steps=STANDING if self.decode_steps == 1 else self.decode_steps)
      for worker in view.able_to_decode
      if worker.name not in busy
    ]


def _only_prefills(worker: WorkerView) -> bool:
  return worker.up and not worker.draining and not worker.role.decodes
