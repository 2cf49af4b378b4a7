"""A file that grows behind a run: what is in it when, and what becomes of lines that cannot be written."""

import collections
import itertools
import logging
import pathlib
import shutil
import threading
import time

import pytest

from pdjax.metrics import lines_file
from pdjax.metrics.lines_file import LinesFile
from tests.full_disk import FullDisk


def until(condition, seconds: float = 60.0) -> None:
  """Wait for something that takes half a second."""
  end_s = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end_s, 'it never came'
    time.sleep(0.01)


_OTHERS: set[threading.Thread] = set()  # of tests that ran before in the same process


def threads() -> list[str]:
  return [one.name for one in threading.enumerate() if one.name.startswith('pdjax-') and one not in _OTHERS]


@pytest.fixture(autouse=True)
def no_thread_is_left():
  _OTHERS.clear()
  _OTHERS.update(threading.enumerate())
  yield
  assert threads() == []


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
  """The errors that were logged."""
  found: list[str] = []
  monkeypatch.setattr(lines_file.logging, 'error', lambda text, *args: found.append(text % args))
  return found


def test_a_line_is_on_disk_while_nothing_more_comes(tmp_path):
  file = LinesFile(tmp_path / 'new' / 'lines')
  assert threads() == []  # which would wait for nothing
  file.add('one')
  until(lambda: file.path.read_text() == 'one\n')
  file.add(lambda: 'two')
  until(lambda: file.path.read_text() == 'one\ntwo\n')
  file.close()
  file.add('three')
  file.close()
  assert file.path.read_text() == 'one\ntwo\n' and file.note is None


def test_lines_come_in_their_order_from_all_sides(tmp_path):
  file = LinesFile(tmp_path / 'lines')
  for number in range(5000):
    file.add(f'{number:0300}' if number % 3 else lambda number=number: str(number))
  file.close()
  assert [*map(int, file.path.read_text().split())] == [*range(5000)]


@pytest.mark.parametrize(
  ('before', 'kept'),
  [
    ('', ''), ('one\n', 'one\n'), ('one\ntw', 'one\n'), ('o', ''), ('one\n' + 'x' * 3_000_000, 'one\n'),
    ('{"id": "a"}\n{"id": "b"', '{"id": "a"}\n'), ('{"id": "a"}\n{"id": "b"}', '{"id": "a"}\n{"id": "b"}\n'),
  ],
)  # fmt: skip
def test_lines_come_behind_what_is_there_but_for_a_torn_last_one(tmp_path, before, kept):
  (tmp_path / 'lines').write_text(before)
  file = LinesFile(tmp_path / 'lines', behind=True)
  assert (tmp_path / 'lines').read_text() == kept
  file.add('next')
  file.close()
  assert (tmp_path / 'lines').read_text() == f'{kept}next\n'


def test_on_a_full_disk_the_file_ends_with_a_whole_line_and_one_warning_says_from_when_and_why(
  tmp_path, monkeypatch, warnings
):
  FullDisk(monkeypatch, 'lines', room=25)
  file = LinesFile(tmp_path / 'lines')
  for number in range(4):
    file.add('x' * 9, float(number))  # ten bytes each: the third is torn
  until(lambda: file.ended)
  file.add('late', 9.0)
  file.close()
  assert file.path.read_text() == ('x' * 9 + '\n') * 2
  assert warnings == [file.note]
  assert file.note == (
    f'{tmp_path / "lines"} ends early: it has nothing from 2.000 s on, as it cannot be written '
    '(OSError: [Errno 28] No space left on device).'
  )


def test_a_file_that_insists_gets_every_line_once_there_is_room(tmp_path, monkeypatch, warnings):
  monkeypatch.setattr(lines_file, '_AGAIN_S', 0.01)
  disk = FullDisk(monkeypatch, 'lines', room=15)
  file = LinesFile(tmp_path / 'lines', insist=True)
  for number in range(3):
    file.add('x' * 9, float(number))
  until(lambda: file.note is not None)
  assert not file.ended and 'from 1.000 s on' in file.note
  time.sleep(0.1)  # in which it is tried again
  disk.room = 1000
  until(lambda: file.note is None)
  file.add('last')
  file.close()
  assert file.path.read_text() == ('x' * 9 + '\n') * 3 + 'last\n' and len(warnings) == 1


def test_a_disk_that_stays_full_costs_a_file_that_insists_its_last_lines_and_no_more(tmp_path, monkeypatch, warnings):
  FullDisk(monkeypatch, 'lines', room=15)
  file = LinesFile(tmp_path / 'lines', insist=True)
  for number in range(3):
    file.add('x' * 9, float(number))
  file.close()
  assert file.path.read_text() == 'x' * 9 + '\n' and warnings == [file.note]


def test_a_device_that_cannot_be_cut_is_a_full_disk_too(tmp_path, warnings):
  if not pathlib.Path('/dev/full').exists():
    pytest.skip('this system has no /dev/full')
  (tmp_path / 'lines').symlink_to('/dev/full')
  file = LinesFile(tmp_path / 'lines')
  file.add('one', 0.25)
  file.close()
  assert 'from 0.250 s on' in file.note and 'No space left' in file.note and len(warnings) == 1


def test_a_file_that_yields_leaves_the_last_of_the_disk_to_others(tmp_path, monkeypatch, warnings):
  usage = collections.namedtuple('usage', 'total used free')
  left = {tmp_path / 'log': usage(1000, 880, 120), tmp_path / 'answers': usage(1000, 990, 10)}
  monkeypatch.setattr(shutil, 'disk_usage', lambda path: left[path])
  log, answers = LinesFile(tmp_path / 'log', yields=True), LinesFile(tmp_path / 'answers')
  for file in (log, answers):
    file.add('x' * 19)
  until(lambda: all(file.path.read_text() for file in (log, answers)))
  left[tmp_path / 'log'] = usage(1000, 881, 119)
  for file in (log, answers):
    file.add('y' * 19, 1.5)
    file.close()
  assert log.path.read_text() == 'x' * 19 + '\n' and 'from 1.500 s on' in log.note and 'kept for answers' in log.note
  assert answers.path.read_text().count('\n') == 2 and answers.note is None


@pytest.mark.parametrize('insist', [False, True])
def test_a_line_that_cannot_be_made_costs_no_other(tmp_path, warnings, insist):
  def impossible():
    raise RuntimeError('no words')

  file = LinesFile(tmp_path / 'lines', insist=insist)
  for line in ('one', impossible, 'three'):
    file.add(line, 1.0)
  file.close()
  assert file.path.read_text() == 'one\nthree\n' and 'RuntimeError: no words' in file.note and len(warnings) == 1


class Slow:
  """A file whose writes wait for leave."""

  def __init__(self, file, leave):
    self._file, self._leave = file, leave

  def write(self, data) -> int:
    self._leave()
    return self._file.write(data)

  def __getattr__(self, name):
    return getattr(self._file, name)


def slow(monkeypatch, leave) -> None:
  real_open = pathlib.Path.open

  def open_slow(path, mode='r', *args, **kwargs):
    file = real_open(path, mode, *args, **kwargs)
    return Slow(file, leave) if mode == 'wb' else file

  monkeypatch.setattr(pathlib.Path, 'open', open_slow)
  monkeypatch.setattr(lines_file, '_DELAY_S', 0.0)


def test_nobody_who_adds_waits_for_a_disk_that_takes_nothing(tmp_path, monkeypatch, warnings):
  gate = threading.Event()
  slow(monkeypatch, gate.wait)
  monkeypatch.setattr(lines_file, '_CLOSE_S', 0.2)
  file = LinesFile(tmp_path / 'lines')
  for number in range(100):
    file.add('x', float(number))
  file.close()  # gives up after a while
  assert 'TimeoutError: nothing was taken for 0.2 s' in file.note and warnings == [file.note]
  gate.set()
  until(lambda: threads() == [])
  assert file._file.closed  # by its thread, since nobody waits any more


def test_with_much_waiting_for_a_stuck_disk_the_file_ends(tmp_path, monkeypatch, warnings):
  gate = threading.Event()
  slow(monkeypatch, gate.wait)
  monkeypatch.setattr(lines_file, '_STALL_S', 0.1)
  monkeypatch.setattr(lines_file, '_MOST_WAITING', 1000)
  file = LinesFile(tmp_path / 'lines')
  for number in itertools.takewhile(lambda _: not file.ended, itertools.count()):
    file.add('x' * 100, float(number))
    assert number < 100
  assert 'nothing was taken' in file.note and 's on' in file.note
  gate.set()
  file.close()
  assert len(warnings) == 1


def test_nothing_comes_behind_what_could_not_be_written_though_somebody_waited_for_room(
  tmp_path, monkeypatch, warnings
):
  gate, errors = threading.Event(), [OSError(28, 'No space left on device')]

  def leave():
    gate.wait()
    if errors:
      raise errors.pop()

  slow(monkeypatch, leave)
  monkeypatch.setattr(lines_file, '_MOST_WAITING', 1000)
  file = LinesFile(tmp_path / 'lines')
  for number in range(11):
    file.add('x' * 100, float(number))
  late = threading.Thread(target=file.add, args=('late', 11.0))
  late.start()
  until(lambda: file._changed._waiters)  # it waits for room
  gate.set()
  late.join()
  file.close()
  assert file.ended and file.path.read_text() == '' and 'nothing from 0.000 s on' in file.note


def test_a_process_that_may_have_no_more_threads_goes_on_without_the_file(tmp_path, monkeypatch, warnings):
  def start(thread):
    raise RuntimeError("can't start new thread")

  monkeypatch.setattr(threading.Thread, 'start', start)
  file = LinesFile(tmp_path / 'lines')
  file.add('one', 2.0)
  file.add('two', 3.0)
  file.close()
  assert 'nothing from 2.000 s on' in file.note and 'new thread' in file.note and warnings == [file.note]


def test_a_disk_that_is_only_slow_gets_every_line(tmp_path, monkeypatch, warnings):
  slow(monkeypatch, lambda: time.sleep(0.001))
  monkeypatch.setattr(lines_file, '_MOST_WAITING', 1000)
  file = LinesFile(tmp_path / 'lines')
  for number in range(500):
    file.add(f'{number:050}')
  file.close()
  assert [*map(int, file.path.read_text().split())] == [*range(500)] and warnings == []


def test_the_warning_reaches_the_log(tmp_path, monkeypatch, caplog):
  FullDisk(monkeypatch, 'lines', room=0)
  monkeypatch.setattr(logging.getLogger('absl'), 'propagate', True)
  file = LinesFile(tmp_path / 'lines')
  file.add('one')
  file.close()
  assert [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR] == [file.note]
