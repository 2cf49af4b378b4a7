"""A queue that threads feed: what arrives when, who leaves, and how long the loop may sleep."""

import itertools
import math
import threading

import pytest

from pdjax.serving.events import Arrived, Finished, Withdrawn
from pdjax.types import Request, SamplingParams
from pdjax.workload import Live


class Clock:
  """Stands for a backend: each note gets the next time."""

  def __init__(self):
    self.now_s = 0.0

  def interrupt(self, note) -> None:
    self.now_s += 1.0
    note(self.now_s)


@pytest.fixture
def clock() -> Clock:
  return Clock()


@pytest.fixture
def live(clock) -> Live:
  return Live(clock.interrupt, patience_s=10.0)


def request(name: str, **sampling) -> Request:
  return Request(name, (2, 3), SamplingParams(**sampling), arrival_s=99.0)


def arrived(events) -> list[tuple[str, float]]:
  return [(event.request.id, event.request.arrival_s) for event in events]


def test_a_request_arrives_when_it_was_submitted_and_in_no_turn_before(live):
  live.submit(request('a'))
  live.submit(request('b'))
  assert live.next_s() == 1.0
  assert arrived(live.due(1.5)) == [('a', 1.0)]
  assert live.next_s() == 2.0
  assert arrived(live.due(2.0)) == [('b', 2.0)]
  assert live.due(3.0) == []


def test_whoever_leaves_does_so_at_once_but_after_having_arrived(live):
  live.submit(request('a'))
  live.due(1.0)
  live.withdraw('a')  # noted at 2, while the turn of 1 goes on
  assert live.due(1.0) == [Withdrawn('a')]
  live.submit(request('b'))
  live.withdraw('b')
  assert live.due(1.0) == []
  later = live.due(live.next_s())
  assert arrived(later[:1]) == [('b', 3.0)] and later[1:] == [Withdrawn('b')]


def test_an_id_is_never_used_twice_nor_that_of_a_sample(live):
  live.submit(request('a', n=3))
  live.due(1.0)
  live.due(2.0, [Finished(2.0, name, 'stop', (7,)) for name in ('a', 'a#1', 'a#2')])
  for name in ('a', 'a#2'):
    with pytest.raises(ValueError, match=f"the request id '{name}' was used before"):
      live.submit(request(name))
  live.submit(request('b#1'))
  with pytest.raises(ValueError, match="the request id 'b#1' was used before"):
    live.submit(request('b', n=2))
  live.submit(request('b'))  # what was refused has left no trace
  assert live.knows('b') and not live.knows('c')


def test_it_is_closed_once_the_last_has_arrived_and_takes_no_more(live):
  live.submit(request('a'))
  assert not live.closed
  live.close()
  assert not live.closed
  live.due(1.0)
  assert live.closed and live.next_s() == math.inf
  with pytest.raises(RuntimeError, match=r"request 'b' is submitted to a closed queue"):
    live.submit(request('b'))


def test_the_loop_is_woken_once_after_a_quiet_while_and_then_sleeps(live):
  assert live.next_s() == math.inf
  live.submit(request('a'))
  live.due(2.0)
  assert live.next_s() == 12.0
  live.due(7.0)  # something else happened
  assert live.next_s() == 17.0
  live.due(17.25)
  assert live.next_s() == math.inf  # now the loop asks whether anything is under way
  live.due(40.0)
  assert live.next_s() == 50.0


@pytest.mark.parametrize('late', ['arrival', 'end'])
def test_what_happens_in_the_last_moment_begins_another_while(live, clock, late):
  live.due(2.0)
  clock.now_s = 10.0
  if late == 'arrival':
    live.submit(request('a'))
  live.due(12.0, [Finished(12.0, 'b', 'stop', (7,))] if late == 'end' else [])
  assert live.next_s() == 22.0


def test_many_threads_lose_nothing(live):
  lock, times_s = threading.Lock(), itertools.count(1)

  def interrupt(note):
    with lock:
      note(float(next(times_s)))

  live = Live(interrupt)

  def submit_all(thread: int) -> None:
    for i in range(50):
      live.submit(request(f'{thread}-{i}'))
      live.withdraw(f'{thread}-{i}')

  threads = [threading.Thread(target=submit_all, args=(thread,)) for thread in range(8)]
  for thread in threads:
    thread.start()
  events = []
  while len(events) < 800:
    events += live.due(1e9)
  for thread in threads:
    thread.join()
  position = {
    (type(event), getattr(event, 'request', None)): i
    for i, event in enumerate(events)
    if not isinstance(event, Arrived)
  }
  for i, event in enumerate(events):
    if isinstance(event, Arrived):
      assert i < position[Withdrawn, event.request.id]
  assert len(position) == 400


def test_whoever_leaves_wakes_the_loop_of_a_closed_queue(live):
  live.submit(request('a'))
  live.due(1.0)
  live.close()
  assert live.next_s() == math.inf
  live.withdraw('a')
  assert live.next_s() == 0.0
  assert live.due(9.0) == [Withdrawn('a')]
  assert live.next_s() == math.inf
