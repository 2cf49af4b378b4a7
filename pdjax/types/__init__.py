"""Plain data that everything else speaks in."""

from pdjax.types.cluster import (
  DeviceError,
  Role,
  TransferSpec,
  WorkerSpec,
  colocated_pool,
  decode_pool,
  parse_split,
  prefill_pool,
)
from pdjax.types.hardware import ChipSpec, LinkSpec
from pdjax.types.model import ModelSpec, RopeScaling
from pdjax.types.processes import RayCluster
from pdjax.types.request import SLO, Completion, FinishReason, Request, SamplingParams, TokenLogprob

__all__ = [
  'SLO', 'ChipSpec', 'Completion', 'DeviceError', 'FinishReason', 'LinkSpec', 'ModelSpec', 'RayCluster', 'Request',
  'Role', 'RopeScaling', 'SamplingParams', 'TokenLogprob', 'TransferSpec', 'WorkerSpec', 'colocated_pool',
  'decode_pool', 'parse_split', 'prefill_pool',
]  # fmt: skip
