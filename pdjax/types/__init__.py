"""Plain data that everything else speaks in."""

from pdjax.types.cache import CacheArray, CacheKind
from pdjax.types.cluster import DeviceError, colocated_pool, decode_pool, parse_split, prefill_pool
from pdjax.types.faults import FaultSpec
from pdjax.types.hardware import ChipSpec, LinkSpec
from pdjax.types.model import ModelSpec, RopeScaling
from pdjax.types.processes import RayCluster
from pdjax.types.request import SLO, Completion, FinishReason, Request, SamplingParams, TokenLogprob
from pdjax.types.transfer import TransferSpec
from pdjax.types.worker import Role, WorkerSpec

__all__ = [
  'SLO', 'CacheArray', 'CacheKind', 'ChipSpec', 'Completion', 'DeviceError', 'FaultSpec', 'FinishReason', 'LinkSpec',
  'ModelSpec', 'RayCluster', 'Request', 'Role', 'RopeScaling', 'SamplingParams', 'TokenLogprob', 'TransferSpec',
  'WorkerSpec', 'colocated_pool', 'decode_pool', 'parse_split', 'prefill_pool',
]  # fmt: skip
