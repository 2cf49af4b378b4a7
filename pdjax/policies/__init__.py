"""What to do next: policies are pure functions of the cluster's state."""

from pdjax.policies.colocated import Colocated
from pdjax.policies.disaggregated import Disaggregated
from pdjax.policies.placement import FewestQueuedTokens, FewestSequences, MostFreePages, Placement

__all__ = ['Colocated', 'Disaggregated', 'FewestQueuedTokens', 'FewestSequences', 'MostFreePages', 'Placement']
