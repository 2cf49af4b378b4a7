"""Eight virtual CPU devices for every test that computes, made before JAX starts; and the longest files first.

Tests compile more than they compute, so their programs are optimised little, and what one process compiles none other
compiles again: a cache of programs lasts as long as the run.
"""

import os
import tempfile

import jax

from tests.compiling import CACHE, quick_start

jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)
with quick_start():
  jax.devices()

LONGEST = (
  'test_golden.py', 'test_check_transfers.py', 'test_tokens.py', 'test_tpu_programs.py',
  'test_worker.py', 'test_processes.py', 'test_matrix_engine.py', 'test_endings.py',
)  # fmt: skip


def pytest_configure(config):
  """Make the cache, or take that of the process that began the run."""
  if CACHE not in os.environ:
    folder = tempfile.TemporaryDirectory(prefix='pdjax-tests-')
    os.environ[CACHE] = folder.name
    config.add_cleanup(folder.cleanup)
  jax.config.update('jax_compilation_cache_dir', os.environ[CACHE])
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)


def pytest_collection_modifyitems(items):
  """Begin with what takes longest: of two workers none then has a long file left when the other is done."""
  items.sort(key=lambda item: item.path.name not in LONGEST)
