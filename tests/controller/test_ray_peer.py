"""A worker's process as its controller sees it: that it lives, hangs or is gone, whatever it is asked."""

import math
import threading
import time

import pytest

from pdjax.controller import ray_peer
from pdjax.controller.ray_peer import RayPeer
from pdjax.serving.peers import PeerLost
from pdjax.types.cluster import DeviceError
from tests.controller.fake_ray import Actor, FakeRay, Service

FAR_S = 30.0  # no test waits for so long


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  monkeypatch.setattr(ray_peer, '_PULSE_S', 0.02)


def peer_of(
  *actors: Actor,
  silence_s: float = 0.2,
  start_s: float = FAR_S,
  ray: FakeRay | None = None,
  service: Service | None = None,
) -> RayPeer:
  left = iter(actors)
  return RayPeer('decode0', lambda name: next(left), ray or FakeRay(), service or Service(), silence_s, start_s)


def test_what_takes_long_is_waited_for_as_long_as_the_process_lives():
  actor = Actor({'load': lambda: time.sleep(0.8) or 'loaded'})
  assert peer_of(actor).ask('load') == 'loaded'
  assert actor.asked.count('pulse') > 5


def test_what_is_answered_at_once_costs_no_further_call():
  actor = Actor({'clock': lambda: 1.5})
  peer = peer_of(actor)
  assert [peer.ask('clock'), peer.ask('clock')] == [1.5, 1.5]
  assert actor.asked == ['start', 'clock', 'clock']


@pytest.mark.parametrize('method', ['machine', 'load', 'listen'])
def test_a_process_that_hangs_is_lost_after_its_silence_from_the_first_call_on(method):
  actor = Actor({'machine': lambda: None, 'load': lambda: None, 'listen': lambda seconds: ()})
  peer = peer_of(actor)
  actor.stopped.set()
  begin = time.perf_counter()
  with pytest.raises(PeerLost, match=r"the process of worker 'decode0' has not answered for 0\.2 s"):
    peer.listen() if method == 'listen' else peer.ask(method)
  assert time.perf_counter() - begin < FAR_S / 2


def test_a_process_that_hangs_in_the_middle_of_a_call_is_lost_though_its_answer_is_not_due():
  actor = Actor({'load': lambda: time.sleep(FAR_S)})
  peer = peer_of(actor)
  threading.Timer(0.3, actor.stopped.set).start()
  with pytest.raises(PeerLost, match='has not answered'):
    peer.ask('load')
  assert 'pulse' in actor.asked


def test_with_an_endless_silence_nothing_is_asked_meanwhile():
  actor = Actor({'load': lambda: time.sleep(0.2) or 'loaded'})
  assert peer_of(actor, silence_s=math.inf).ask('load') == 'loaded'
  assert actor.asked == ['start', 'load']


def test_a_process_that_is_gone_in_the_middle_of_a_call_is_lost_at_once():
  actor = Actor({'load': lambda: time.sleep(FAR_S)})
  peer = peer_of(actor, silence_s=FAR_S)
  threading.Timer(0.1, actor.gone).start()
  begin = time.perf_counter()
  with pytest.raises(PeerLost, match=r"the process of worker 'decode0' is gone \(The actor d"):
    peer.ask('load')
  assert time.perf_counter() - begin < FAR_S / 2


def test_what_a_method_raises_comes_as_it_is():
  def load():
    raise ValueError('other weights')

  with pytest.raises(ValueError, match='other weights'):
    peer_of(Actor({'load': load})).ask('load')


@pytest.mark.parametrize('silence_s', [0.01, math.inf])
def test_a_process_that_does_not_come_is_not_waited_for_without_end(silence_s):
  peer = peer_of(Actor({}, is_there=threading.Event()), Actor({'clock': lambda: 1.5}), silence_s=silence_s, start_s=0.1)
  with pytest.raises(PeerLost, match=r"the process of worker 'decode0' was not there after 0\.1 s"):
    peer.ask('clock')
  peer.restart()
  assert peer.ask('clock') == 1.5


def test_a_process_that_takes_long_to_come_is_not_silent(monkeypatch):
  there = threading.Event()
  threading.Timer(0.5, there.set).start()
  assert peer_of(Actor({'clock': lambda: 1.5}, there)).ask('clock') == 1.5


def test_a_process_that_hangs_is_ended_without_waiting_for_it(monkeypatch):
  ray, actor = FakeRay(), Actor({'load': lambda: None, 'close': lambda: None})
  peer = peer_of(actor, ray=ray)
  actor.stopped.set()
  with pytest.raises(PeerLost):
    peer.ask('load')
  peer.close()
  assert ray.killed == [actor] and 'close' not in actor.asked
  with pytest.raises(PeerLost, match='gets no new process'):
    peer.restart()


def test_a_process_that_lives_is_asked_to_end_first():
  ray, actor = FakeRay(), Actor({'close': lambda: None})
  peer_of(actor, ray=ray).close()
  assert actor.asked == ['close'] and ray.killed == [actor]


@pytest.mark.parametrize('moment', ['start', 'load', 'listen'])
def test_what_is_waited_for_ends_when_the_control_service_is_lost(moment):
  service, there = Service(), threading.Event()
  actor = Actor({'load': lambda: time.sleep(FAR_S), 'listen': lambda seconds: time.sleep(FAR_S)}, there)
  peer = peer_of(actor, silence_s=FAR_S, service=service)
  if moment != 'start':
    there.set()
  threading.Timer(0.2, service.lost.set).start()
  begin = time.perf_counter()
  with pytest.raises(DeviceError, match="Ray's control service is lost"):
    peer.listen() if moment == 'listen' else peer.ask('load')
  assert time.perf_counter() - begin < FAR_S / 2
  there.set()


def test_no_process_is_begun_where_the_control_service_takes_no_order(monkeypatch):
  """As a service that was stopped, which listens and answers nothing."""
  service = Service()

  def call(do, limit_s):
    raise TimeoutError

  actor = Actor({'clock': lambda: 1.5})
  peer = peer_of(actor, actor, service=service)
  monkeypatch.setattr(service, 'call', call)
  with pytest.raises(PeerLost, match=r"gets no process: Ray's control service at 10\.0\.0\.1:6379 has not answered"):
    peer.restart()
