"""Pieces that land are written once, and only if somebody still waits for them."""

import math
import types

import numpy as np
import pytest

from pdjax.engine.runner import Broken, Runner, crash_poster
from pdjax.engine.under_way import Incoming, Landed, Missed, UnderWay
from pdjax.engine.waiters import Waiters
from pdjax.kv.transfer import CorruptError, Parcel
from pdjax.serving.mailbox import Mailbox
from pdjax.serving.orders import TransferOrder
from pdjax.types.span import Span


class Worker:
  """A target that computes nothing."""

  spec = types.SimpleNamespace(name='decode0')
  incarnation = 1


class Way:
  """A way that notes what it writes."""

  def __init__(self):
    self.written: list[Parcel] = []
    self.error: Exception | None = None

  def receive(self, parcel: Parcel):
    if self.error is not None:
      raise self.error
    self.written.append(parcel)
    return types.SimpleNamespace(block_until_ready=lambda: np.zeros(1))


class Target:
  """A worker with transfers under way to it."""

  def __init__(self):
    self.worker, self.way, self.mailbox = Worker(), Way(), Mailbox()
    self.runner = Runner(self.worker, self.mailbox)
    self.waiters = Waiters('test', crash_poster(self.mailbox))
    self.incoming = Incoming({'decode0': self.runner}, self.mailbox, self.waiters)

  def transfer(self, number: int, incarnation: int = 1) -> UnderWay:
    order = TransferOrder(number, 'r', 'prefill0', 'decode0', Span((0,), (0,), 0, 4), incarnations=(1, incarnation))
    return UnderWay(number, order, Parcel((), (0, 1), wire_bytes=60, num_pieces=1, gathered=()), self.way)

  def next(self):
    (item,) = self.mailbox.collect(math.inf)[1]
    return item


@pytest.fixture
def target():
  made = Target()
  yield made
  made.waiters.close()
  made.runner.close()


def test_a_transfer_that_has_landed_is_written_once(target):
  transfer = target.transfer(3)
  target.incoming.add(transfer)
  assert target.incoming.under_way == (transfer,)
  landed = target.next()
  assert isinstance(landed, Landed) and landed.transfer is transfer and 0 < landed.began_s < landed.arrived_s
  assert target.incoming.write(transfer) and not target.incoming.write(transfer)
  assert target.way.written == [transfer.parcel] and target.incoming.under_way == ()


def test_what_was_given_up_is_not_written_though_another_of_its_number_is_under_way(target):
  first, second = target.transfer(3), target.transfer(3)
  target.incoming.add(first)
  assert target.incoming.give_up(3) is first and first.parcel.abandoned
  assert target.incoming.give_up(3) is None
  target.incoming.add(second)
  assert not target.incoming.write(first) and not target.incoming.end(first)
  assert target.way.written == [] and target.incoming.under_way == (second,)


def test_what_was_meant_for_an_earlier_incarnation_is_not_written(target):
  transfer = target.transfer(3, incarnation=1)
  target.incoming.add(transfer)
  target.worker.incarnation = 2
  assert not target.incoming.write(transfer)
  assert target.way.written == [] and target.incoming.under_way == ()


def test_a_write_that_fails_has_taken_the_pages(target):
  transfer = target.transfer(3)
  target.incoming.add(transfer)
  target.next()
  target.way.error = RuntimeError('no room')
  assert not target.incoming.write(transfer)
  broken = target.next()
  assert isinstance(broken, Broken) and (broken.worker, broken.incarnation) == ('decode0', 1)
  assert broken.error == 'RuntimeError: no room'


def test_a_transfer_that_no_thread_can_wait_for_is_not_under_way(target, monkeypatch):
  def refuse(key, job):
    raise RuntimeError("can't start new thread")

  monkeypatch.setattr(target.waiters, 'add', refuse)
  with pytest.raises(RuntimeError, match='new thread'):
    target.incoming.add(target.transfer(3))
  assert target.incoming.under_way == ()


@pytest.mark.parametrize(('error', 'corrupt'), [(CorruptError('damaged'), True), (RuntimeError('torn'), False)])
def test_what_does_not_arrive_is_told_with_its_reason(target, error, corrupt):
  def fail():
    raise error

  transfer = target.transfer(3)
  transfer.parcel.wait = fail
  target.incoming.add(transfer)
  missed = target.next()
  assert isinstance(missed, Missed) and missed.transfer is transfer
  assert (missed.corrupt, missed.error) == (corrupt, f'{type(error).__name__}: {error}')
