"""How much XLA is to make of programs: next to nothing for tiny models, what it can for a real one."""

import contextlib
import functools
import os
from collections.abc import Iterator
from unittest import mock

import jax
import jaxlib.version

CACHE = 'PDJAX_TEST_CACHE'  # in the environment: the folder of what was compiled in this run of the tests

# For what is compiled once and run a few times: half the CPU time of the kernels' tests in interpret mode.
QUICK = '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true'
_FULL = {'xla_backend_optimization_level': 3, 'xla_llvm_disable_expensive_passes': False}
if jaxlib.version.__version_info__ < (0, 11, 1):  # 0.11.2 ends the process for a flag that it no longer has
  QUICK += ' --xla_cpu_use_fusion_emitters=false'
  _FULL['xla_cpu_use_fusion_emitters'] = True


def quick_start() -> contextlib.AbstractContextManager:
  """Where JAX starts in here, its programs for CPU are optimised little; the TPU compiler would refuse such flags."""
  return mock.patch.dict(os.environ, XLA_FLAGS=f'{os.environ.get("XLA_FLAGS", "")} {QUICK}')


def quick_environment() -> dict[str, str]:
  """The environment of a process whose programs are optimised little, or taken from those compiled before."""
  cache = {'JAX_COMPILATION_CACHE_DIR': os.environ[CACHE], 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.1'}
  with quick_start():
    return os.environ | cache


@contextlib.contextmanager
def optimised() -> Iterator[None]:
  """What is compiled ahead of time meanwhile is optimised as it is outside of tests."""
  compile = jax.stages.Lowered.compile
  jax.stages.Lowered.compile = functools.partialmethod(compile, _FULL)
  try:
    yield
  finally:
    jax.stages.Lowered.compile = compile
