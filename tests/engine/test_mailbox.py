"""One queue with the clock of the run: stamps and turns never contradict each other."""

import functools
import itertools
import math
import queue
import threading
import time
import weakref

import pytest

from pdjax.engine.engine import Engine
from pdjax.engine.mailbox import Mailbox, Waiter, Waiters


def test_a_turn_finds_what_was_posted_before_it_in_order():
  mailbox = Mailbox()
  for name in 'abc':
    mailbox.post(lambda stamp, name=name: (name, stamp))
  now_s, items = mailbox.collect(math.inf)
  assert [name for name, _ in items] == ['a', 'b', 'c']
  assert items[-1][1] < now_s
  assert mailbox.collect(0.0)[1] == []


def test_stamps_and_turns_increase_strictly_even_if_the_clock_stands_still(monkeypatch):
  mailbox = Mailbox()
  monkeypatch.setattr(time, 'perf_counter', lambda: 5.0)
  mailbox.start_clock()
  stamps = []
  for _ in range(3):
    mailbox.post(stamps.append)
    mailbox.post(stamps.append)
    stamps.append(mailbox.collect(0.0)[0])
  assert all(before < after for before, after in itertools.pairwise(stamps))


def test_a_turn_finds_exactly_what_was_stamped_up_to_it_while_threads_post():
  mailbox = Mailbox()
  mailbox.start_clock()
  posts, threads = 300, 4

  def post_all():
    for _ in range(posts):
      mailbox.post(lambda stamp: stamp)

  running = [threading.Thread(target=post_all) for _ in range(threads)]
  for thread in running:
    thread.start()
  turns = []
  while sum(len(stamps) for _, stamps in turns) < posts * threads:
    turns.append(mailbox.collect(60.0))
  for thread in running:
    thread.join()
  last_s = 0.0
  for now_s, stamps in turns:
    for stamp in [*stamps, now_s]:  # nothing stamped before a turn is found after it, and no two are equal
      assert stamp > last_s
      last_s = stamp


def test_a_wait_ends_when_its_time_has_come():
  mailbox = Mailbox()
  mailbox.start_clock()
  until_s = mailbox.now_s() + 0.02
  now_s, items = mailbox.collect(until_s)
  assert items == [] and now_s >= until_s


def test_a_wait_without_end_ends_with_a_post():
  mailbox = Mailbox()
  poster = threading.Timer(0.02, lambda: mailbox.post(lambda stamp: 'posted'))
  poster.start()
  assert mailbox.collect(math.inf)[1] == ['posted']
  poster.join()


def test_a_wait_for_what_is_past_returns_at_once_with_what_is_there():
  mailbox = Mailbox()
  mailbox.post(lambda stamp: 'posted')
  assert mailbox.collect(-1.0)[1] == ['posted']
  assert mailbox.collect(-1.0)[1] == []


def test_the_clock_starts_at_zero():
  mailbox = Mailbox()
  mailbox.post(lambda stamp: stamp)
  before_s = mailbox.collect(0.0)[0]
  time.sleep(before_s + 0.01)
  mailbox.start_clock()
  assert mailbox.collect(0.0)[0] < mailbox.now_s() < before_s + 0.01


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


def test_an_interrupt_ends_a_wait_and_what_it_notes_is_of_the_turn(one_and_one):
  engine = Engine(list(one_and_one.workers.values()), one_and_one.transports)
  engine.start_clock()
  noted = []
  waker = threading.Timer(0.02, lambda: engine.interrupt(noted.append))
  waker.start()
  now_s, events = engine.wait(math.inf)
  waker.join()
  engine.close()
  assert events == [] and len(noted) == 1 and noted[0] < now_s


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
  waiter.add(job) if kind is Waiter else waiter.add(1, job)
  del held, job
  assert ran.wait(10.0)
  deadline_s = time.monotonic() + 10.0
  while gone() is not None and time.monotonic() < deadline_s:
    time.sleep(0.001)
  assert gone() is None
  waiter.close()
