"""The baseline: every worker prefills and decodes, prompt chunks fused with decodes under a token budget."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import ClassVar

from pdjax.policies.admission import Admission
from pdjax.policies.base import PolicyBase
from pdjax.policies.batching import decodes_any, fill_prefills, preempt_newest
from pdjax.policies.fetching import keep_ended
from pdjax.policies.order import Order
from pdjax.policies.placement import FewestQueuedTokens, Placement
from pdjax.serving.actions import ALL, STANDING, Action, Step
from pdjax.serving.checks import PolicyError
from pdjax.serving.view import ClusterView, RequestView
from pdjax.types.checked import Count, check_fields
from pdjax.types.request import Request
from pdjax.types.worker import Role


@dataclasses.dataclass(frozen=True)
class Colocated(PolicyBase):
  """Decodes first, then as many prompt tokens as the budget leaves, in one step (Sarathi-Serve, Agrawal et al. 2024).

  Nothing moves between workers. A step without prompt tokens runs several decode steps on the device.

  Attributes:
    token_budget: Most tokens of one step, a decoding sequence counted as one.
    decode_steps: Decode steps fused on the device where no prompt has work; with 1, a step stands until something
      changes.
    placement: Chooses the worker of a new request.
    returns_to: The place to which the blocks of requests that have ended are copied, a worker or one that only holds
      pages; None leaves them where they are.
    min_fetch: Fewest tokens of a prompt that are fetched from another place before it begins.
    order_by: The order of requests that wait; None for that of arrival.
    admission: Says which requests are rejected instead; None for none.
  """

  moves_kv: ClassVar[bool] = False

  token_budget: Count = 256
  decode_steps: Count = 1
  placement: Placement = FewestQueuedTokens()
  returns_to: str | None = None
  min_fetch: Count = 1
  order_by: Order | None = None
  admission: Admission | None = None

  def __post_init__(self):
    check_fields(self)
    if self.returns_to == 'source':
      raise ValueError(
        "Colocated has returns_to='source', but what it decodes lies where it was prefilled; name another place, or "
        'leave it out.'
      )

  @property
  def waiting_key(self) -> Callable[[Request], tuple[float, ...]] | None:  # type: ignore[override]
    """The key of `order_by`, if there is one."""
    return None if self.order_by is None else self.order_by.key

  def decide(self, view: ClusterView) -> list[Action]:
    if view.grows and (preempted := preempt_newest(view)):
      return [*preempted]
    if not any(Role.BOTH in worker.spec.roles for worker in view.workers.values()):
      raise PolicyError(
        f'{type(self).__name__} wants workers of role "both", but the cluster has {", ".join(view.workers)}; use '
        'colocated_pool, or the policy Disaggregated.'
      )
    kept = keep_ended(view, self.returns_to)
    workers = [worker for worker in view.able_to_prefill if worker.role.decodes]
    if not workers:
      return [*kept]
    room = view.room()
    prompts = view.waiting or any(worker.prefilling for worker in workers)  # else nobody asks for the budgets
    budgets = {
      worker.name: max(self.token_budget - len(worker.decodable()), 0) if prompts else self.token_budget
      for worker in workers
    }
    waiting = self.order(view.waiting.values())
    everyone = None if self.admission is None else [one for one in view.prefill_workers if one.role.decodes]
    prefills = fill_prefills(
      view, room, workers, budgets, waiting, self.placement, lambda entry, worker: None, self.min_fetch,
      admission=self.admission, everyone=everyone,
    )  # fmt: skip
    actions: list[Action] = []
    for name, chunks in prefills.chunks.items():
      worker = view.workers[name]
      if chunks:
        actions.append(Step(name, tuple(chunks), ALL if decodes_any(worker) else ()))
      elif worker.has_work:
        actions.append(Step(name, decodes=ALL, steps=STANDING if self.decode_steps == 1 else self.decode_steps))
    return [*prefills.rejections, *prefills.fetches, *actions, *kept]

  def order(self, waiting: Iterable[RequestView]) -> Iterable[RequestView]:
    """The waiting prompts in the order to serve them."""
    return waiting
