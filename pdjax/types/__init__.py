"""Plain data that everything else speaks in."""

from pdjax.types.cache import CacheArray, CacheKind
from pdjax.types.cluster import DeviceError, colocated_pool, decode_pool, parse_split, prefill_pool
from pdjax.types.faults import FaultSpec
from pdjax.types.hardware import ChipSpec, LinkSpec
from pdjax.types.model import GQA, MLA, Experts, Gated, ModelSpec, Plain, RopeScaling
from pdjax.types.places import HostPlace
from pdjax.types.prefix_cache import PrefixCache
from pdjax.types.processes import RayCluster
from pdjax.types.request import SLO, Completion, FinishReason, Request, SamplingParams, TokenLogprob
from pdjax.types.transfer import TransferSpec
from pdjax.types.worker import Role, WorkerSpec

__all__ = [
  'GQA', 'MLA', 'SLO', 'CacheArray', 'CacheKind', 'ChipSpec', 'Completion', 'DeviceError', 'Experts', 'FaultSpec',
  'FinishReason', 'Gated', 'HostPlace', 'LinkSpec', 'ModelSpec', 'Plain', 'PrefixCache', 'RayCluster', 'Request',
  'Role', 'RopeScaling', 'SamplingParams', 'TokenLogprob', 'TransferSpec', 'WorkerSpec', 'colocated_pool',
  'decode_pool', 'parse_split', 'prefill_pool',
]  # fmt: skip
