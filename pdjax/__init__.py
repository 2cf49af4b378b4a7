"""pdjax: prefill/decode disaggregation of language model serving in JAX, with one policy for engine and simulator.

Names are looked up when they are first used, so that what only decides (types, policies, simulator) never loads JAX.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from pdjax.comparison import Comparison, compare
  from pdjax.config import ServingConfig
  from pdjax.cost import Roofline
  from pdjax.generation import generate
  from pdjax.launch import run, simulate
  from pdjax.metrics import Report
  from pdjax.model.checkpoint import load
  from pdjax.policies import Colocated, Disaggregated
  from pdjax.recording import RunResult
  from pdjax.serving import (
    ALL,
    STANDING,
    Cancel,
    Chunk,
    ClusterView,
    Preempt,
    Reject,
    Step,
    SwitchRole,
    Transfer,
    WakeAt,
  )
  from pdjax.session import Delta, RequestError, Session, SessionError, Stream
  from pdjax.types import (
    SLO,
    ChipSpec,
    Completion,
    HostPlace,
    LinkSpec,
    ModelSpec,
    PrefixCache,
    Request,
    Role,
    SamplingParams,
    WorkerSpec,
    colocated_pool,
    decode_pool,
    prefill_pool,
  )
  from pdjax.workload import (
    Bursty,
    ClosedLoopWorkload,
    Constant,
    Empirical,
    Fixed,
    Given,
    Lognormal,
    Mix,
    MultiTurn,
    Phase,
    Phases,
    Poisson,
    Share,
    TraceWorkload,
    Uniform,
  )

__version__ = '0.1.0'

_HOMES = {
  'pdjax.comparison': ['Comparison', 'compare'],
  'pdjax.config': ['ServingConfig'],
  'pdjax.cost': ['Roofline'],
  'pdjax.metrics': ['Report'],
  'pdjax.model.checkpoint': ['load'],
  'pdjax.policies': ['Colocated', 'Disaggregated'],
  'pdjax.recording': ['RunResult'],
  'pdjax.generation': ['generate'],
  'pdjax.launch': ['run', 'simulate'],
  'pdjax.serving': [
    'ALL', 'STANDING', 'Cancel', 'Chunk', 'ClusterView', 'Preempt', 'Reject', 'Step', 'SwitchRole', 'Transfer',
    'WakeAt',
  ],
  'pdjax.session': ['Delta', 'RequestError', 'Session', 'SessionError', 'Stream'],
  'pdjax.types': [
    'SLO', 'ChipSpec', 'Completion', 'HostPlace', 'LinkSpec', 'ModelSpec', 'PrefixCache', 'Request', 'Role',
    'SamplingParams', 'WorkerSpec', 'colocated_pool', 'decode_pool', 'prefill_pool',
  ],
  'pdjax.workload': [
    'Bursty', 'ClosedLoopWorkload', 'Constant', 'Empirical', 'Fixed', 'Given', 'Lognormal', 'Mix', 'MultiTurn',
    'Phase', 'Phases', 'Poisson', 'Share', 'TraceWorkload', 'Uniform',
  ],
}  # fmt: skip
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
  'ALL', 'SLO', 'STANDING', 'Bursty', 'Cancel', 'ChipSpec', 'Chunk', 'ClosedLoopWorkload', 'ClusterView', 'Colocated',
  'Comparison', 'Completion', 'Constant', 'Delta', 'Disaggregated', 'Empirical', 'Fixed', 'Given', 'HostPlace',
  'LinkSpec', 'Lognormal', 'Mix', 'ModelSpec', 'MultiTurn', 'Phase', 'Phases', 'Poisson', 'Preempt', 'PrefixCache',
  'Reject', 'Report', 'Request', 'RequestError', 'Role', 'Roofline', 'RunResult', 'SamplingParams', 'ServingConfig',
  'Session', 'SessionError', 'Share', 'Step', 'Stream', 'SwitchRole', 'TraceWorkload', 'Transfer', 'Uniform',
  'WakeAt', 'WorkerSpec', 'colocated_pool', 'compare', 'decode_pool', 'generate', 'load', 'prefill_pool', 'run',
  'simulate',
]  # fmt: skip


def __getattr__(name: str):
  if name not in _HOME_OF:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
  return __all__
