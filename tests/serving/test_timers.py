"""Timers come in order, once, and not at all if they were called off."""

import math

from pdjax.serving.events import TimerDue
from pdjax.serving.timers import Timers


def test_what_is_due_comes_in_order_and_once():
  timers = Timers()
  timers.set('retry', 2, 3.0)
  timers.set('deadline', 1, 2.0)
  timers.set('deadline', 7, 2.0)
  timers.set('deadline', 9, 8.0)
  assert timers.next_s == 2.0
  assert timers.take(1.9) == []
  assert timers.take(3.0) == [TimerDue(2.0, 'deadline', 1), TimerDue(2.0, 'deadline', 7), TimerDue(3.0, 'retry', 2)]
  assert timers.take(3.0) == [] and timers.next_s == 8.0


def test_what_was_called_off_is_never_due():
  timers = Timers()
  timers.set('deadline', 1, 2.0)
  timers.cancel('deadline', 1)
  timers.cancel('deadline', 5)
  assert timers.next_s == math.inf and timers.take(9.0) == []


def test_what_is_set_again_is_due_then_and_only_then():
  timers = Timers()
  timers.set('deadline', 1, 2.0)
  timers.set('deadline', 1, 5.0)
  assert timers.take(4.0) == [] and timers.next_s == 5.0
  timers.set('deadline', 1, 1.0)
  assert timers.take(9.0) == [TimerDue(1.0, 'deadline', 1)]


def test_a_timer_set_at_infinity_is_never_due():
  timers = Timers()
  timers.set('patience', 'decode0', math.inf)
  assert timers.next_s == math.inf and timers.take(1e300) == []
