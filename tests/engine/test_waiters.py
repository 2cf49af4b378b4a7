"""Threads that wait: jobs in order on one, and side by side on as many as are needed."""

import functools
import queue
import threading
import time
import weakref

import pytest

from pdjax.engine.waiters import Waiter, Waiters


def test_jobs_run_in_order_on_a_thread_of_their_own():
  waiter = Waiter('test', crashed=print)
  ran = []
  gate = threading.Event()
  waiter.add(lambda: gate.wait(60))
  for i in range(20):
    waiter.add(lambda i=i: ran.append((i, threading.current_thread().name)))
  assert ran == []
  gate.set()
  waiter.close()  # runs what is left
  assert [i for i, _ in ran] == list(range(20))
  assert {name for _, name in ran} == {'pdjax-test'}


def test_draining_waits_for_what_was_added_before():
  waiter, ran = Waiter('test', crashed=print), []
  waiter.add(lambda: (time.sleep(0.05), ran.append(0)))
  waiter.drain()
  assert ran == [0]
  waiter.close()


@pytest.mark.parametrize('jobs', [0, 3])
def test_a_closed_waiter_has_no_thread(jobs):
  waiter = Waiter('closing', crashed=print)
  for _ in range(jobs):
    waiter.add(lambda: None)
  waiter.close()
  assert 'pdjax-closing' not in {thread.name for thread in threading.enumerate()}


def test_what_a_job_raises_is_told_and_the_jobs_after_it_run():
  told, ran = [], []
  waiter = Waiter('failing', crashed=told.append)
  waiter.add(lambda: 1 // 0)
  waiter.add(lambda: ran.append('after'))
  waiter.close()
  assert [type(error) for error in told] == [ZeroDivisionError] and ran == ['after']


def test_a_job_that_never_ends_holds_up_no_other_and_no_end():
  ended, stall = queue.SimpleQueue(), threading.Event()
  waiters = Waiters('test', ended.put)
  waiters.add(0, stall.wait)
  for key in range(1, 20):
    waiters.add(key, functools.partial(ended.put, key))
  assert {ended.get(timeout=10) for _ in range(19)} == set(range(1, 20))
  waiters.forget(0)
  waiters.close()
  stall.set()


def test_threads_that_have_nothing_to_wait_for_wait_for_the_next():
  waiters = Waiters('test', lambda error: None)
  for key in range(30):
    done = threading.Event()
    waiters.add(key, done.set)
    assert done.wait(10)
    while waiters._left:
      time.sleep(1e-4)
  assert len(waiters._threads) == 1
  waiters.close()
  assert not waiters._threads[0].is_alive()


def test_closing_waits_for_what_is_under_way():
  ended = []
  waiters = Waiters('test', lambda error: None)
  waiters.add(0, lambda: (time.sleep(0.05), ended.append(0)))
  waiters.close()
  assert ended == [0]


def test_a_job_for_which_there_is_no_thread_is_none(monkeypatch):
  waiters = Waiters('test', lambda error: None)

  def refuse(thread):
    raise RuntimeError("can't start new thread")

  with monkeypatch.context() as patched, pytest.raises(RuntimeError, match='new thread'):
    patched.setattr(threading.Thread, 'start', refuse)
    waiters.add(0, print)
  assert not waiters._left
  done = threading.Event()
  waiters.add(1, done.set)
  assert done.wait(10)
  waiters.close()


def test_a_job_that_raises_is_told_of():
  told: queue.SimpleQueue = queue.SimpleQueue()
  waiters = Waiters('test', told.put)
  waiters.add(0, lambda: 1 / 0)
  assert isinstance(told.get(timeout=10), ZeroDivisionError)
  waiters.close()


@pytest.mark.parametrize('kind', [Waiter, Waiters])
def test_a_thread_that_has_nothing_to_do_holds_nothing(kind):
  waiter, ran = kind('test', lambda error: None), threading.Event()
  held = threading.Event()  # stands for arrays on a device
  job = functools.partial(lambda _: ran.set(), held)
  gone = weakref.ref(held)
  waiter.add(job) if kind is Waiter else waiter.add(held, job)
  del held, job
  assert ran.wait(10.0)
  deadline_s = time.monotonic() + 10.0
  while gone() is not None and time.monotonic() < deadline_s:
    time.sleep(0.001)
  assert gone() is None
  waiter.close()
