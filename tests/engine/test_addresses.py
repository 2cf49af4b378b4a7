"""What is said of an address before anything long begins."""

import socket
import threading

import pytest

from pdjax.engine import addresses
from pdjax.engine.addresses import check_cluster, check_own, own_addresses
from pdjax.types.cluster import DeviceError


@pytest.fixture
def address():
  """Where somebody listens who never says a word."""
  with socket.create_server(('127.0.0.1', 0)) as server:
    yield f'127.0.0.1:{server.getsockname()[1]}'


def asking(monkeypatch, code: str) -> None:
  """Let that be what asks the control service."""
  monkeypatch.setattr(addresses, '_ASK', f'import sys, time\n{code}')


def test_a_service_that_answers_is_reached(monkeypatch, address):
  asking(monkeypatch, f'assert sys.argv[1] == {address!r}')
  check_cluster(address)


@pytest.mark.parametrize(
  'code, words',
  [
    ("sys.exit('noise\\npdjax: InvalidAuthToken: other token')", 'InvalidAuthToken: other token'),
    ('time.sleep(60)', r'somebody listens there, but did not answer as its control service for 0\.3 s'),
  ],
)
def test_somebody_else_at_the_address_is_told_apart(monkeypatch, address, code, words):
  monkeypatch.setattr(addresses, '_ANSWER_S', 0.3 if 'sleep' in code else 30.0)
  asking(monkeypatch, code)
  with pytest.raises(DeviceError, match=rf'no Ray cluster can be reached at {address} \({words}\); name host and port'):
    check_cluster(address)


def test_ray_itself_is_asked_and_called_off_where_nobody_answers(monkeypatch, address):
  pytest.importorskip('ray._raylet', reason='Ray comes with pip install pdjax[cluster]')
  monkeypatch.setattr(addresses, '_ANSWER_S', 1.0)
  with pytest.raises(DeviceError, match='did not answer as its control service'):
    check_cluster(address)


def test_where_nobody_listens_the_address_is_named():
  with socket.create_server(('127.0.0.1', 0)) as server:
    port = server.getsockname()[1]
  with pytest.raises(
    DeviceError, match=rf'no Ray cluster can be reached at 127\.0\.0\.1:{port} \(Connection refused\)'
  ):
    check_cluster(f'127.0.0.1:{port}')


def test_a_name_that_nobody_resolves_does_not_hold_the_run_up(monkeypatch):
  monkeypatch.setattr(addresses, '_CONNECT_S', 0.05)
  resolved = threading.Event()

  def connect(*_):
    resolved.wait(30.0)
    raise OSError('no such name')

  monkeypatch.setattr(socket, 'create_connection', connect)
  with pytest.raises(DeviceError, match=r'at far\.example:6379 \(nobody answered for 0\.05 s\)'):
    check_cluster('far.example:6379')
  resolved.set()


def test_an_address_of_another_host_is_refused_with_those_of_this_one():
  check_own('127.0.0.1')
  with pytest.raises(DeviceError, match=r"processes.host is '192\.0\.2\.7', where nothing can listen .*127\.0\.0\.1"):
    check_own('192.0.2.7')
  assert '127.0.0.1' in own_addresses()
