"""The base class of policies: what a cluster must know of one before it is asked, with defaults."""

import abc
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from pdjax.serving.actions import Action
from pdjax.serving.view import ClusterView


class PolicyBase(abc.ABC):
  """A policy, and what a cluster must know of it before it is asked.

  Attributes:
    moves_kv: Whether it may send KV from worker to worker; if not, no ways between workers are prepared.
    moves_anywhere: Whether it may send KV between any two places; then ways are prepared between all of them. Else
      there are those from workers that prefill to workers that decode, and to and from places that only hold pages.
    decode_steps: Most decode steps that it asks for at once, which workers must be able to fuse.
    waiting_key: A method that gives the key of a `Request`, a tuple, by which `view.waiting` is ordered; None for the
      order of arrival. It is asked once a request, so that ageing must be linear in the arrival.
  """

  moves_kv: ClassVar[bool] = True
  moves_anywhere: bool = False
  decode_steps: int = 1
  waiting_key: ClassVar[Callable[..., tuple[Any, ...]] | None] = None

  @abc.abstractmethod
  def decide(self, view: ClusterView) -> Iterable[Action]:
    """Decide what to do now; see `pdjax.serving.Policy`."""


def as_policy(policy: Any) -> PolicyBase:
  """A policy with all that `PolicyBase` says of one, where it is a class that has `decide` alone too."""
  return policy if isinstance(policy, PolicyBase) else _Completed(policy)


class _Completed(PolicyBase):
  """A policy of a class of its own; it may say by itself what `PolicyBase` says."""

  def __init__(self, policy: Any):
    self._policy = policy
    for name in ('moves_kv', 'moves_anywhere', 'decode_steps', 'waiting_key'):
      setattr(self, name, getattr(policy, name, getattr(PolicyBase, name)))

  def decide(self, view: ClusterView) -> Iterable[Action]:
    return self._policy.decide(view)
