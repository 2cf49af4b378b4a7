"""Policies, which choose what is done next: pure functions of the view of the cluster."""

from pdjax.policies.admission import Admission, RejectLate
from pdjax.policies.base import PolicyBase, as_policy
from pdjax.policies.colocated import Colocated
from pdjax.policies.deciders import AlwaysLocal, AlwaysRemote, Decider, SoonestFirstToken, UncachedThreshold
from pdjax.policies.disaggregated import Disaggregated
from pdjax.policies.order import EarliestDeadline, Order, PriorityClasses, ShortestFirst
from pdjax.policies.placement import (
  FewestQueuedTokens,
  LeastWork,
  LongestPrefix,
  MostFreePages,
  MostFreeSlots,
  Placement,
  SoonestFirst,
  StickyPrefix,
)
from pdjax.policies.roles import FollowLoad

__all__ = [
  'Admission', 'AlwaysLocal', 'AlwaysRemote', 'Colocated', 'Decider', 'Disaggregated', 'EarliestDeadline',
  'FewestQueuedTokens', 'FollowLoad', 'LeastWork', 'LongestPrefix', 'MostFreePages', 'MostFreeSlots', 'Order',
  'Placement', 'PolicyBase', 'PriorityClasses', 'RejectLate', 'ShortestFirst', 'SoonestFirst', 'SoonestFirstToken',
  'StickyPrefix', 'UncachedThreshold', 'as_policy',
]  # fmt: skip
