"""A call that does not return keeps nobody waiting."""

import time

import pytest

from pdjax.controller.calls import call_within

FAR_S = 30.0  # no test waits for so long


def test_a_call_that_does_not_return_is_left_behind():
  with pytest.raises(TimeoutError, match=r'no answer for 0\.1 s'):
    call_within(lambda: time.sleep(FAR_S), 0.1)
  assert call_within(lambda: 5, FAR_S) == 5
  with pytest.raises(ZeroDivisionError):
    call_within(lambda: 1 // 0, FAR_S)


def test_what_is_looked_at_meanwhile_ends_the_wait():
  def check():
    raise ValueError('over')

  with pytest.raises(ValueError, match='over'):
    call_within(lambda: time.sleep(FAR_S), FAR_S, check)
