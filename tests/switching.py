"""Policies from outside that give workers other roles, and requests to be served meanwhile."""

import dataclasses
import random
from collections.abc import Iterable

from pdjax.policies import Disaggregated, PolicyBase
from pdjax.serving import Action, ClusterView, SwitchRole, WorkerView
from pdjax.types import Request, Role, SamplingParams
from tests.tiny import prompt

EITHER = (Role.PREFILL, Role.DECODE)


@dataclasses.dataclass(frozen=True)
class SwitchByLoad(PolicyBase):
  """A worker more for the phase in which requests wait; all else as another policy has it.

  Computed prompts that have nowhere to go call for decode, and prompts that were not begun for prefill.
  """

  policy: PolicyBase = Disaggregated(max_prefill_tokens=16)
  most_waiting: int = 3

  def decide(self, view: ClusterView) -> Iterable[Action]:
    workers = view.workers.values()
    if not any(worker.draining for worker in workers):
      role = Role.DECODE if view.prefilled else Role.PREFILL
      waits = view.prefilled or view.waiting
      others = [worker for worker in workers if worker.role is not role and role in worker.spec.roles]
      if len(waits) > self.most_waiting and len(others) > 1:
        emptiest = min(others, key=lambda worker: worker.used_bytes)
        return [SwitchRole(emptiest.name, role)]
    return self.policy.decide(view)


@dataclasses.dataclass(frozen=True)
class TakeTurns(PolicyBase):
  """Whenever so many more have ended, one of three workers changes sides: 1P2D, 2P1D, and back."""

  policy: PolicyBase = Disaggregated(max_prefill_tokens=16)
  every: int = 3

  def decide(self, view: ClusterView) -> Iterable[Action]:
    turn = min((entry.number for entry in view.requests.values()), default=0) // self.every
    if not any(worker.draining for worker in view.workers.values()):
      fewer, role = view.prefill_workers, Role.DECODE
      if turn % 2:
        fewer, role = view.decode_workers, Role.PREFILL
      if len(fewer) == 2:
        return [SwitchRole(fewer[turn // 2 % 2].name, role)]
    return self.policy.decide(view)


@dataclasses.dataclass(frozen=True)
class Swapped(PolicyBase):
  """Two workers have each other's role before anything is served."""

  prefills: str
  decodes: str
  policy: PolicyBase = Disaggregated(max_prefill_tokens=16)

  def decide(self, view: ClusterView) -> Iterable[Action]:
    for name, role in ((self.decodes, Role.PREFILL), (self.prefills, Role.DECODE)):
      worker = view.workers[name]
      if worker.role is not role:
        return [] if worker.draining else [SwitchRole(name, role)]
    return self.policy.decide(view)


@dataclasses.dataclass(frozen=True)
class RandomRoles(PolicyBase):
  """Whenever so many more have ended, each worker wants any of its roles, and gets it where that is allowed.

  What it does follows from the view alone, so that a replay does the same.
  """

  policy: PolicyBase = Disaggregated(max_prefill_tokens=16)
  every: int = 3

  def decide(self, view: ClusterView) -> Iterable[Action]:
    turn = min((entry.number for entry in view.requests.values()), default=0) // self.every
    for worker in view.workers.values():
      role = random.Random(f'{worker.name} {turn}').choice(worker.spec.roles)
      if is_allowed(view, worker, role):
        return [SwitchRole(worker.name, role)]
    return self.policy.decide(view)


def is_allowed(view: ClusterView, worker: WorkerView, role: Role) -> bool:
  """Whether a worker may be given a role now, as the books should see it."""
  if role is (worker.draining or worker.role):
    return False
  others = [one for one in view.workers.values() if one is not worker and not one.given_up]
  lasting = [{one.role, one.draining or one.role} for one in others]
  prefills = any(all(one.prefills for one in roles) for roles in lasting)
  decodes = any(all(one.decodes for one in roles) for roles in lasting)
  gives_up_prefill = worker.role.prefills and not role.prefills
  gives_up_decode = worker.role.decodes and not role.decodes
  return (prefills or not gives_up_prefill) and (decodes or not gives_up_decode)


SAMPLED = ({}, {'temperature': 0.8}, {'temperature': 1.2, 'top_p': 0.7}, {'temperature': 0.9, 'presence_penalty': 0.5})


def under_load(count: int = 240, seed: int = 0, gap_s: float = 0.001) -> list[Request]:
  """So many, a few at a time, of all lengths and sampled in all ways."""
  rng = random.Random(seed)
  return [
    Request(
      f'r{index}', prompt(rng.randint(1, 30), seed=index),
      SamplingParams(max_tokens=rng.randint(1, 12), seed=index, ignore_eos=bool(index % 3), **SAMPLED[index % 4]),
      arrival_s=gap_s * index,
    )
    for index in range(count)
  ]  # fmt: skip
