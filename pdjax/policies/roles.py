"""Roles that follow the load: a worker changes sides where the other phase is short of workers."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from pdjax.policies.base import PolicyBase
from pdjax.policies.batching import is_new
from pdjax.policies.disaggregated import Disaggregated
from pdjax.policies.forecast import decode_step_seconds
from pdjax.serving.actions import Action, SwitchRole
from pdjax.serving.view import ClusterView, WorkerView
from pdjax.types.checked import Rate, Seconds, Share, check_fields
from pdjax.types.worker import Role


@dataclasses.dataclass(frozen=True)
class FollowLoad(PolicyBase):
  """Another policy, and one worker more for the phase that is short of them, such as from 3P1D to 1P3D and back.

  Prefill is short where the next request has waited for long; decode is short where a computed prompt has nowhere to
  go, or where a step is predicted to take longer than TPOT may. Where both are, nothing helps. The side that gives a
  worker must be able to do without it, and after a change nothing changes for a while, so that roles do not swing
  (as in Arrow, Wu et al. 2025, which moves instances between the phases).

  Workers need `may_become`.

  Attributes:
    policy: All else; sequences of a decode worker that drains move on if its `moves_on` says so.
    wait_s: Seconds that the next request has waited when prefill is short of workers; prefill can do without one
      where it has waited for less than half of them.
    tpot_s: Seconds of a decode step at which decode is short of workers; None looks at room alone.
    full: Share of the slots, and of the pages, of decode workers that those that stay may have in use.
    dwell_s: Fewest seconds from one change to the next.
  """

  policy: PolicyBase = Disaggregated(moves_on=True)
  wait_s: Rate = 0.5
  tpot_s: Rate | None = None
  full: Share = 0.9
  dwell_s: Seconds = 5.0

  def __post_init__(self):
    check_fields(self)

  @property
  def moves_anywhere(self) -> bool:  # type: ignore[override]
    """Whether `policy` moves KV anywhere."""
    return self.policy.moves_anywhere

  @property
  def returns_to(self) -> str | None:
    """The place to which `policy` returns blocks, if it does."""
    return getattr(self.policy, 'returns_to', None)

  @property
  def decode_steps(self) -> int:  # type: ignore[override]
    """The decode steps that `policy` asks for at once."""
    return self.policy.decode_steps

  @property
  def waiting_key(self) -> Callable[..., tuple[Any, ...]] | None:  # type: ignore[override]
    """The key of `policy`, if it names one."""
    return self.policy.waiting_key

  def decide(self, view: ClusterView) -> Iterable[Action]:
    switch = self._switch(view)
    return self.policy.decide(view) if switch is None else [switch]

  def _switch(self, view: ClusterView) -> SwitchRole | None:
    workers = view.workers.values()
    if any(worker.draining or view.now_s - worker.role_since_s < self.dwell_s for worker in workers):
      return None
    new = filter(is_new, view.waiting.values())
    waited_s = next((view.now_s - one.request.arrival_s for one in new), 0.0)
    decode_is_short = _lacks_room(view) or self._is_slow(view)
    if decode_is_short and waited_s < self.wait_s / 2:
      return _switched([one for one in view.prefill_workers if not one.role.decodes], Role.DECODE)
    if waited_s >= self.wait_s and not decode_is_short:
      return _switched([one for one in view.decode_workers if not one.role.prefills], Role.PREFILL, self.full)
    return None

  def _is_slow(self, view: ClusterView) -> bool:
    limit_s = self.tpot_s
    return limit_s is not None and any(decode_step_seconds(one) > limit_s for one in view.decode_workers)


def _lacks_room(view: ClusterView) -> bool:
  """Whether the first of the computed prompts has nowhere to go."""
  request = next(iter(view.prefilled), None)
  if request is None:
    return False
  return not view.room().fitting(request, [one for one in view.decode_workers if not one.draining], decodes=True)


def _switched(workers: list[WorkerView], role: Role, full: float | None = None) -> SwitchRole | None:
  """The change of one of some workers, of which others stay, in which `full` bounds what is used of slots and pages."""
  workers = [worker for worker in workers if worker.up]
  able = [worker for worker in workers if role in worker.spec.roles]
  if len(workers) < 2 or not able:
    return None
  chosen = min(able, key=lambda worker: (worker.used_bytes, worker.queued_tokens))
  others = [worker for worker in workers if worker is not chosen]
  if full is not None:
    slots = sum(worker.spec.max_sequences for worker in others)
    in_use = sum(len(worker.decoding) for worker in workers)
    used_bytes, num_bytes = sum(one.used_bytes for one in workers), sum(one.num_bytes for one in others)
    if in_use > full * slots or used_bytes > full * num_bytes:
      return None
  return SwitchRole(chosen.name, role)
