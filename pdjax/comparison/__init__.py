"""Disaggregated against colocated: the same workload on the same devices, over rates, splits, divisions and sizes."""

from pdjax.comparison.contest import Case as Case
from pdjax.comparison.contest import Contest as Contest
from pdjax.comparison.contest import Outcomes as Outcomes
from pdjax.comparison.contest import contests as contests
from pdjax.comparison.running import compare as compare
from pdjax.comparison.systems import System as System
from pdjax.comparison.systems import at_rate as at_rate
from pdjax.comparison.systems import colocated_systems as colocated_systems
from pdjax.comparison.systems import disaggregated_systems as disaggregated_systems
from pdjax.comparison.systems import with_split as with_split
from pdjax.comparison.verdict import Comparison as Comparison
from pdjax.comparison.verdict import print_comparison as print_comparison
