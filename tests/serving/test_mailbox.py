"""One queue with the clock of the run: stamps and turns never contradict each other."""

import itertools
import math
import threading
import time

from pdjax.serving.mailbox import Mailbox


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
