"""Signals that ask a command to end."""

import gc
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from experiments.stop_signals import Stopped, StopSignals

ROOT = pathlib.Path(__file__).parents[2]
CODES = {'SIGINT': 130, 'SIGTERM': 143, 'SIGHUP': 129}


@pytest.mark.parametrize('name', sorted(CODES))
def test_the_first_signal_raises_and_what_handled_it_before_does_so_afterwards(name):
  number = signal.Signals[name]
  before = signal.getsignal(number)
  with StopSignals() as signals:
    assert signals.exit_code is None
    with pytest.raises(Stopped, match=name):
      os.kill(os.getpid(), number)
      signal.pause()
    assert signals.received is number and signals.exit_code == CODES[name]
  assert signal.getsignal(number) is before


def test_a_stop_that_python_lets_not_through_is_raised_again():
  """As in a callback of the garbage collector, of which JAX has one."""
  came = []

  def callback(phase, info):
    if not came:
      came.append(phase)
      os.kill(os.getpid(), signal.SIGTERM)
      time.sleep(0.01)  # here it is raised

  gc.callbacks.append(callback)
  try:
    with StopSignals() as signals:
      gc.collect()
      assert signals.received is signal.SIGTERM  # and yet nothing was raised
      begun_s = time.monotonic()
      with pytest.raises(Stopped, match='SIGTERM'):
        time.sleep(30)
      assert time.monotonic() - begun_s < 15  # the sleep was broken off
      time.sleep(0.1)  # it counts for no second one
  finally:
    gc.callbacks.remove(callback)


def test_a_signal_that_comes_while_results_are_written_is_only_remembered():
  with StopSignals() as signals:
    signals.hold()
    os.kill(os.getpid(), signal.SIGTERM)
    assert signals.exit_code == 143


def test_what_was_ignored_is_ignored():
  before = signal.signal(signal.SIGINT, signal.SIG_IGN)
  try:
    with StopSignals() as signals:
      os.kill(os.getpid(), signal.SIGINT)
      assert signals.received is None
  finally:
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize('name', sorted(CODES))
def test_a_second_signal_ends_the_process_at_once(name):
  code = f"""
import os, signal, time
from experiments.stop_signals import StopSignals
with StopSignals() as signals:
  try:
    os.kill(os.getpid(), signal.SIGTERM)
    signal.pause()
  finally:
    time.sleep(0.3)
    os.kill(os.getpid(), signal.{name})
    time.sleep(60)
    print('still here')
"""
  done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=False)
  assert done.returncode == CODES[name] and done.stdout == done.stderr == ''


def test_a_second_signal_ends_a_process_that_is_not_in_python():
  code = """
import hashlib
from experiments.stop_signals import StopSignals
with StopSignals():
  print('begun', flush=True)
  hashlib.pbkdf2_hmac('sha256', b'a', b'b', 2**31 - 1)  # an hour, in which no handler of Python's is called
"""
  with subprocess.Popen([sys.executable, '-c', code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
    assert process.stdout.readline() == 'begun\n'
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130


def test_nothing_is_left_of_it_afterwards():
  before = {*threading.enumerate()}, len(os.listdir('/proc/self/fd')) if os.path.isdir('/proc/self/fd') else 0
  with StopSignals():
    pass
  after = {*threading.enumerate()}, len(os.listdir('/proc/self/fd')) if os.path.isdir('/proc/self/fd') else 0
  assert after == before
  with StopSignals() as signals:  # and another one counts from the beginning
    signals.hold()
    os.kill(os.getpid(), signal.SIGTERM)
  assert signals.received is signal.SIGTERM


def test_the_two_signals_of_timeout_are_one():
  with StopSignals() as signals:
    signals.hold()
    for _ in range(3):
      os.kill(os.getpid(), signal.SIGTERM)
    assert signals.received is signal.SIGTERM


def test_a_signal_that_ray_handled_counts():
  signals = StopSignals()
  signals.note(ValueError('15'))
  signals.note(SystemExit(1))
  assert signals.exit_code is None
  signals.note(SystemExit(15))
  assert signals.received is signal.SIGTERM and signals.exit_code == 143
