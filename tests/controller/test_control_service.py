"""A control service that is gone is noticed within seconds, and one that is away for a moment is no loss."""

import math
import socket
import threading
import time

import pytest

from pdjax.controller import calls, control_service
from pdjax.controller.control_service import ControlService
from pdjax.controller.process_engine import ProcessEngine
from pdjax.types.cluster import DeviceError

FAR_S = 30.0  # no test waits for so long


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  monkeypatch.setattr(control_service, '_EACH_S', 0.02)
  monkeypatch.setattr(calls, '_LOOK_S', 0.02)


def listening(port: int = 0) -> socket.socket:
  return socket.create_server(('127.0.0.1', port))


def test_a_service_that_is_gone_is_told_once_to_everyone_and_ends_what_waits(monkeypatch):
  monkeypatch.setattr(control_service, '_AWAY_S', 0.1)
  server = listening()
  service = ControlService(f'127.0.0.1:{server.getsockname()[1]}')
  told: list[DeviceError] = []
  service.when_lost(told.append)
  service.check()
  server.close()
  with pytest.raises(
    DeviceError, match=rf"Ray's control service at {service.address} is lost \(Connection refused, for"
  ):
    service.call(lambda: time.sleep(FAR_S), FAR_S)
  assert service.is_lost
  with pytest.raises(DeviceError, match='is lost'):
    service.check()
  service.when_lost(told.append)
  assert len(told) == 2 and told[0] is told[1]


def test_a_service_that_is_away_for_a_moment_is_not_lost(monkeypatch):
  monkeypatch.setattr(control_service, '_AWAY_S', 1.0)
  looked: list[str | None] = []
  answers = iter(['Connection refused'] * 3 + [None] * 3)
  monkeypatch.setattr(control_service, '_why_away', lambda host, port: looked.append(next(answers, None)) or looked[-1])
  begin = time.monotonic()
  service = ControlService('127.0.0.1:1')
  while len(looked) < 8 or time.monotonic() - begin < 1.2:
    time.sleep(0.02)
  assert looked[:3] == ['Connection refused'] * 3 and not service.is_lost
  service.close()


def test_who_cannot_look_does_not_take_the_service_for_lost(monkeypatch):
  """Such as a process that has no more files to open."""

  def refuse(*_):
    raise OSError(24, 'Too many open files')

  monkeypatch.setattr(socket, 'create_connection', refuse)
  assert control_service._why_away('127.0.0.1', 1) is None


def test_a_service_is_not_looked_at_once_it_is_closed():
  with listening() as server:
    service = ControlService(f'127.0.0.1:{server.getsockname()[1]}')
    thread = next(one for one in threading.enumerate() if one.name == 'pdjax-control-service' and one.is_alive())
    service.close()
    thread.join(FAR_S)
    assert not thread.is_alive() and not service.is_lost


def test_a_run_that_waits_for_what_may_never_come_ends_when_it_is_told_so():
  engine = ProcessEngine({}, {}, {})
  engine.start_clock()
  error = DeviceError('the control service is lost')
  threading.Timer(0.1, lambda: engine.fail(error)).start()
  assert engine.wait(math.inf)[1] == []  # what came before is heard first
  for _ in range(2):
    with pytest.raises(DeviceError) as caught:
      engine.wait(math.inf)
    assert caught.value is error
  engine.close()
