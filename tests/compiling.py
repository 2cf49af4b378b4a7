"""How much XLA is to make of programs: next to nothing for tiny models, what it can for a real one."""

import contextlib
import functools
from collections.abc import Iterator

import jax

# For what is compiled once and run a few times: half the CPU time of the kernels' tests in interpret mode.
QUICK = (
  '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false'
)

_FULL = {
  'xla_backend_optimization_level': 3,
  'xla_llvm_disable_expensive_passes': False,
  'xla_cpu_use_fusion_emitters': True,
}


@contextlib.contextmanager
def optimised() -> Iterator[None]:
  """What is compiled ahead of time meanwhile is optimised as it is outside of tests."""
  compile = jax.stages.Lowered.compile
  jax.stages.Lowered.compile = functools.partialmethod(compile, _FULL)
  try:
    yield
  finally:
    jax.stages.Lowered.compile = compile
