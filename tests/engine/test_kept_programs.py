"""Where JAX keeps compiled programs, as a config says."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from pdjax.engine import worker_process
from pdjax.engine.build import keep_programs, kept_programs
from pdjax.engine.worker_process import WorkerProcess

OPTIONS = (
  'jax_compilation_cache_dir',
  'jax_persistent_cache_min_compile_time_secs',
  'jax_persistent_cache_min_entry_size_bytes',
)


@pytest.fixture(autouse=True)
def as_before():
  """What JAX keeps is for all of a process."""
  before = {name: getattr(jax.config, name) for name in OPTIONS}
  yield
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


def compile_something(factor: int) -> None:
  jax.jit(lambda x: jnp.sin(x) * factor).lower(jnp.ones(3)).compile()


def test_every_program_is_kept_however_quick_and_off_keeps_none(tmp_path):
  keep_programs(str(tmp_path / 'first'))
  compile_something(101)
  assert any((tmp_path / 'first').glob('*-cache')) and kept_programs() == str(tmp_path / 'first')
  keep_programs(str(tmp_path / 'second'))  # not where it was before
  compile_something(102)
  assert len(list((tmp_path / 'second').glob('*-cache'))) >= 1
  count = len(list(tmp_path.glob('*/*-cache')))
  keep_programs('off')
  compile_something(103)
  assert len(list(tmp_path.glob('*/*-cache'))) == count and kept_programs() is None


def test_without_a_word_jax_is_left_as_it_is():
  before = kept_programs()
  keep_programs(None)
  assert kept_programs() == before


def test_a_process_takes_the_folder_that_jax_was_given_before_any_other(monkeypatch):
  monkeypatch.setattr(worker_process, 'kept_programs', lambda: '/kept/by/jax')
  assert WorkerProcess().share_programs('/of/the/run') is None


def test_processes_of_a_run_share_a_temporary_folder_that_is_gone_in_the_end(monkeypatch, tmp_path):
  monkeypatch.setattr(worker_process, 'kept_programs', lambda: None)
  monkeypatch.setattr('tempfile.tempdir', str(tmp_path))
  first, second, third = WorkerProcess(), WorkerProcess(), WorkerProcess()
  folder = first.share_programs(None)
  assert second.share_programs(folder) == folder
  first.close()
  assert third.share_programs(folder) == folder  # the next process of a worker finds what the one before compiled
  second.close()
  third.close()
  assert list(tmp_path.iterdir()) == []
