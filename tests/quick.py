"""Programs of tiny models compile in a third of the time if what they compile to is not optimised."""

import contextlib
import functools
from collections.abc import Iterator

import jax

OPTIONS = {
  'xla_backend_optimization_level': 0,
  'xla_llvm_disable_expensive_passes': True,
  'xla_cpu_use_fusion_emitters': False,
}


@contextlib.contextmanager
def quick_compiles() -> Iterator[None]:
  """What is compiled ahead of time meanwhile is not optimised; only for CPU."""
  compile = jax.stages.Lowered.compile
  jax.stages.Lowered.compile = functools.partialmethod(compile, OPTIONS)
  try:
    yield
  finally:
    jax.stages.Lowered.compile = compile
