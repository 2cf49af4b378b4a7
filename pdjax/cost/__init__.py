"""Predictions: the time that steps and transfers take, and the pages that fit into memory."""

from pdjax.cost.cost_model import CostBase, CostModel, as_cost
from pdjax.cost.memory import size_by_chip, size_pools
from pdjax.cost.roofline import Roofline
from pdjax.cost.worker_cost import WorkerCost

__all__ = ['CostBase', 'CostModel', 'Roofline', 'WorkerCost', 'as_cost', 'size_by_chip', 'size_pools']
