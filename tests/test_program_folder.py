"""The folder of compiled programs of a run: who may share it, and that none is left."""

import errno
import fcntl
import os
import stat
import subprocess
import sys
import tempfile
import threading

import pytest

from pdjax import program_folder
from pdjax.program_folder import ProgramFolder, remove_left_over, remove_when_unused


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
  """The folder in which folders are made."""
  monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
  return tmp_path


def left(folders) -> list[str]:
  return sorted(path.name for path in folders.glob('pdjax-programs-*'))


def test_nobody_else_can_look_into_it_and_the_last_to_let_go_removes_it(folders):
  first = ProgramFolder.make()
  second = ProgramFolder.share(first.path)
  assert second.path == first.path and os.path.dirname(first.path) == str(folders)
  assert stat.S_IMODE(os.stat(first.path).st_mode) == 0o700
  (folders / first.path / 'a-program').write_bytes(b'...')
  for share in (first, first, second):
    assert len(left(folders)) == 1
    share.close()
  assert left(folders) == []


def test_two_runs_share_nothing():
  first, second = ProgramFolder.make(), ProgramFolder.make()
  assert first.path != second.path
  first.close()
  assert not os.path.exists(first.path) and os.path.exists(second.path)
  second.close()


@pytest.mark.parametrize('planted', ['gone', 'writable', 'a link', 'a file', 'in use elsewhere'])
def test_what_may_be_somebody_elses_by_now_is_not_shared(folders, planted):
  path = folders / 'planted'
  if planted == 'a file':
    path.touch(0o600)
  elif planted == 'a link':
    (folders / 'real').mkdir(0o700)
    path.symlink_to(folders / 'real')
  elif planted != 'gone':
    path.mkdir(0o700)
  if planted == 'writable':
    path.chmod(0o770)
  if planted == 'in use elsewhere':
    (path / 'in_use').symlink_to(folders / 'elsewhere')
  made = ProgramFolder.share(str(path))
  assert made.path != str(path) and 'pdjax-programs-' in made.path
  made.close()
  assert os.path.lexists(path) == (planted != 'gone')


def test_what_another_process_made_is_held_only_while_it_is_there(folders):
  first = ProgramFolder.make()
  second = ProgramFolder.hold(first.path)
  first.close()
  assert second is not None and os.path.exists(first.path)
  second.close()
  assert ProgramFolder.hold(first.path) is None and left(folders) == []


@pytest.mark.parametrize('broken', ['no locks', 'full disk', 'no such folder'])
def test_where_there_can_be_no_folder_the_reason_is_raised_and_nothing_is_left(folders, broken, monkeypatch):
  def fail(*_):
    raise OSError(errno.ENOLCK if broken == 'no locks' else errno.ENOSPC, broken)

  if broken == 'no locks':
    monkeypatch.setattr(fcntl, 'flock', fail)
  elif broken == 'full disk':
    monkeypatch.setattr(program_folder, '_open', fail)
  else:
    monkeypatch.setattr(tempfile, 'tempdir', str(folders / 'nowhere'))
  with pytest.raises(OSError, match='nowhere' if broken == 'no such folder' else broken):
    ProgramFolder.share(None)
  remove_left_over()
  assert list(folders.iterdir()) == []


def test_what_a_killed_run_left_is_removed_by_the_next_and_what_is_in_use_is_not(folders, monkeypatch):
  code = (
    'import tempfile, sys, os; tempfile.tempdir = sys.argv[1]; from pdjax.program_folder import ProgramFolder\n'
    'kept = ProgramFolder.make(); print(kept.path, flush=True); os.kill(os.getpid(), 9)'
  )
  killed = subprocess.run([sys.executable, '-c', code, str(folders)], capture_output=True, text=True, check=False)
  assert left(folders) == [os.path.basename(killed.stdout.strip())]
  in_use = ProgramFolder.make()
  remove_left_over()  # a folder of a moment ago may be another run's that has not locked it yet
  assert len(left(folders)) == 2
  monkeypatch.setattr(program_folder, '_YOUNG_S', -1.0)
  remove_left_over()
  assert left(folders) == [os.path.basename(in_use.path)]
  in_use.close()


def test_one_whose_processes_were_killed_is_removed_once_they_are_gone(folders):
  share = ProgramFolder.make()
  remove_when_unused(share.path, 0.1)
  assert os.path.exists(share.path)
  timer = threading.Timer(0.2, os.close, [share._held])  # as when a process ends
  timer.start()
  remove_when_unused(share.path, 30.0)
  assert left(folders) == []
  timer.join()
  remove_when_unused(share.path, 30.0)  # nothing is left to do


def test_a_folder_that_was_not_made_here_is_never_removed(folders):
  own = folders / 'programs-of-mine'
  own.mkdir(0o700)
  remove_when_unused(str(own), 0.1)
  assert own.exists()
