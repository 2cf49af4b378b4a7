"""The folder of compiled programs is the one that a config says, and programs that cannot be read are removed."""

import logging
import os
import tempfile
import warnings

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from pdjax.engine import kept_programs as kept
from pdjax.engine import worker_process
from pdjax.engine.kept_programs import keep_programs, kept_programs, why_not_kept
from pdjax.engine.worker_process import WorkerProcess

OPTIONS = (
  'jax_compilation_cache_dir',
  'jax_persistent_cache_min_compile_time_secs',
  'jax_persistent_cache_min_entry_size_bytes',
)


@pytest.fixture(autouse=True)
def as_before():
  """Undo the settings of JAX, which are for all of a process."""
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


def test_a_folder_that_takes_no_programs_is_told_once_and_not_by_each_of_them(tmp_path):
  file = tmp_path / 'file'
  file.write_text('')
  assert keep_programs(str(file / 'inside')) == 'Not a directory' and kept_programs() is None
  compile_something(107)  # without a warning of JAX, which would be an error here
  assert keep_programs(str(tmp_path / 'fine')) is None and kept_programs() == str(tmp_path / 'fine')


def test_programs_in_a_folder_that_takes_no_more_are_read(tmp_path, monkeypatch):
  keep_programs(str(tmp_path))
  monkeypatch.setattr(kept, 'why_not_kept', lambda folder: 'Read-only file system')
  count = len(list(tmp_path.iterdir()))
  assert keep_programs(str(tmp_path)) == 'Read-only file system' and kept_programs() == str(tmp_path)
  compile_something(108)
  assert len(list(tmp_path.iterdir())) == count


@pytest.mark.parametrize('damage', ['empty', 'zeros', 'half'])
def test_a_program_that_cannot_be_read_is_written_anew(tmp_path, damage):
  """A process was killed while it wrote it; JAX writes none whose file is there."""
  keep_programs(str(tmp_path))
  compile_something(104)
  whole = {path: path.read_bytes() for path in tmp_path.glob('*-cache')}
  for path, content in whole.items():
    path.write_bytes({'empty': b'', 'zeros': bytes(len(content)), 'half': content[: len(content) // 2]}[damage])
  with pytest.warns(UserWarning, match='Error reading persistent compilation cache entry'):
    compile_something(104)
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    compile_something(104)


def test_nobody_is_shown_more_of_what_jax_logs(tmp_path, caplog):
  with caplog.at_level(logging.INFO):
    keep_programs(str(tmp_path))
    compile_something(105)
  assert [record for record in caplog.records if record.name == 'jax._src.compiler'] == []
  with caplog.at_level(logging.DEBUG, 'jax._src'):
    compile_something(106)
  assert any('PERSISTENT COMPILATION CACHE MISS' in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize('wrong', ['a file', 'below a file', 'full'])
def test_a_folder_that_takes_no_programs_is_known_before(tmp_path, wrong, monkeypatch):
  (tmp_path / 'file').touch()
  folder = {'a file': 'file', 'below a file': 'file/below', 'full': 'full'}[wrong]
  if wrong == 'full':
    monkeypatch.setattr(tempfile, 'TemporaryFile', lambda dir: open('/dev/full', 'wb', buffering=0))  # noqa: SIM115
  reason = {'a file': 'File exists', 'below a file': 'Not a directory', 'full': 'No space left on device'}[wrong]
  assert why_not_kept(str(tmp_path / folder)) == reason


def test_a_folder_that_takes_programs_is_made_and_left_empty(tmp_path):
  assert why_not_kept(str(tmp_path / 'not' / 'yet')) is None
  assert list((tmp_path / 'not' / 'yet').iterdir()) == []
  assert why_not_kept('gs://bucket/programs') is None and not os.path.exists('gs:')


def test_without_a_word_jax_is_left_as_it_is():
  before = kept_programs()
  keep_programs(None)
  assert kept_programs() == before


@pytest.mark.parametrize(('said', 'set_s', 'then_s'), [(None, 1.0, 0.0), (None, 0.1, 0.1), ('1.0', 1.0, 1.0)])
def test_a_process_takes_the_folder_that_jax_was_given_before_any_other(monkeypatch, said, set_s, then_s):
  """And keeps quick programs there too, unless JAX was told how quick."""
  monkeypatch.setattr(worker_process, 'kept_programs', lambda: '/kept/by/jax')
  if said is not None:
    monkeypatch.setenv(OPTIONS[1].upper(), said)
  jax.config.update(OPTIONS[1], set_s)
  assert WorkerProcess().share_programs('/of/the/run') is None
  assert getattr(jax.config, OPTIONS[1]) == then_s


def test_programs_of_a_folder_that_takes_no_more_are_found_in_the_temporary_one(monkeypatch, tmp_path):
  (tmp_path / 'kept').mkdir()
  (tmp_path / 'tmp').mkdir()
  keep_programs(str(tmp_path / 'kept'))
  compile_something(107)
  count = len(list((tmp_path / 'kept').iterdir()))
  monkeypatch.setattr(worker_process, 'kept_programs', lambda: None)
  monkeypatch.setattr('tempfile.tempdir', str(tmp_path / 'tmp'))
  process = WorkerProcess()
  folder = process.share_programs(None, str(tmp_path / 'kept'))
  keep_programs(folder)
  compile_something(107)  # nothing new
  compile_something(108)
  entries = [entry for entry in os.scandir(folder) if entry.name.endswith('-cache')]
  assert len([entry for entry in entries if entry.is_symlink()]) == len([*tmp_path.glob('kept/*-cache')])
  assert len(entries) > len([entry for entry in entries if entry.is_symlink()])
  process.close()
  assert not os.path.exists(folder) and len(list((tmp_path / 'kept').iterdir())) == count


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
