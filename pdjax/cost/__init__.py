"""Predictions: the time that steps and transfers take, and the pages that fit into memory."""

from pdjax.cost.cost_model import CostBase, CostModel, as_cost
from pdjax.cost.memory import size_pools
from pdjax.cost.roofline import Roofline

__all__ = ['CostBase', 'CostModel', 'Roofline', 'as_cost', 'size_pools']
