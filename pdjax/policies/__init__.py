"""Policies, which choose what is done next: pure functions of the view of the cluster."""

from pdjax.policies.base import PolicyBase, as_policy
from pdjax.policies.colocated import Colocated
from pdjax.policies.disaggregated import Disaggregated
from pdjax.policies.placement import FewestQueuedTokens, LongestPrefix, MostFreePages, MostFreeSlots, Placement

__all__ = [
  'Colocated', 'Disaggregated', 'FewestQueuedTokens', 'LongestPrefix', 'MostFreePages', 'MostFreeSlots', 'Placement',
  'PolicyBase', 'as_policy',
]  # fmt: skip
