"""The words for a cluster's address before anything long begins."""

import json
import socket
import threading

import pytest

from pdjax.controller import addresses
from pdjax.controller.addresses import check_cluster
from pdjax.types.cluster import DeviceError


@pytest.fixture
def address():
  """An address at which somebody listens who never says a word."""
  with socket.create_server(('127.0.0.1', 0)) as server:
    yield f'127.0.0.1:{server.getsockname()[1]}'


def asking(monkeypatch, code: str) -> None:
  """Let that be what asks the control service."""
  monkeypatch.setattr(addresses, '_ASK', f'import sys, time\n{code}')


def nodes(*found: tuple[str, bool]) -> str:
  """Code that tells these nodes: the address of each, and whether its processes are here."""
  return f'print("imported", flush=True); print("nodes", {json.dumps(json.dumps(found))})'


def test_a_service_that_answers_is_reached(monkeypatch, address):
  told = f'sys.argv[1] == {address!r} or sys.exit(print("pdjax: asked for", sys.argv[1]))'
  asking(monkeypatch, f'{told}\n{nodes(("127.0.0.1", False))}')
  check_cluster(address)


@pytest.mark.parametrize(
  'code, words',
  [
    ("print('pdjax: InvalidAuthToken: other token')", 'InvalidAuthToken: other token'),
    (
      "print('imported', flush=True); time.sleep(60)",
      r'somebody listens there, but did not answer as its control service for 0\.\d s',
    ),
  ],
)
def test_somebody_else_at_the_address_is_told_apart(monkeypatch, address, code, words):
  if 'sleep' in code:
    monkeypatch.setattr(addresses, '_ANSWER_S', 0.3)
    monkeypatch.setattr(addresses, '_LEAST_S', 0.2)
  monkeypatch.setattr(addresses, '_ALL_S', 60.0)  # a machine may be busy
  asking(monkeypatch, code)
  with pytest.raises(DeviceError, match=rf'no Ray cluster can be reached at {address} \({words}\); name host and port'):
    check_cluster(address)


@pytest.mark.parametrize('code', ['time.sleep(60)', 'raise ImportError("of another Ray")'])
def test_a_ray_that_takes_long_to_import_or_has_other_names_is_no_refusal(monkeypatch, address, code):
  monkeypatch.setattr(addresses, '_ALL_S', 0.5)
  asking(monkeypatch, code)
  check_cluster(address)


@pytest.mark.parametrize('here', [False, True])
def test_a_machine_that_is_no_node_of_the_cluster_is_told_so(monkeypatch, address, here):
  """One that Ray knows by another address, as behind a router, is told by its processes."""
  monkeypatch.setattr(addresses, '_ALL_S', 60.0)
  asking(monkeypatch, nodes(('198.51.100.1', False), ('198.51.100.2', here)))
  if here:
    check_cluster(address)
    return
  with pytest.raises(
    DeviceError,
    match=rf'this machine is no node of the cluster at {address}, whose nodes are at 198\.51\.100\.1, 198\.51\.100\.2, '
    rf'.*; run `ray start --address={address}` here',
  ):
    check_cluster(address)


def test_ray_itself_is_asked_and_called_off_where_nobody_answers(monkeypatch, address):
  pytest.importorskip('ray._raylet', reason='Ray comes with pip install pdjax[cluster]')
  monkeypatch.setattr(addresses, '_ANSWER_S', 1.0)
  monkeypatch.setattr(addresses, '_ALL_S', 60.0)
  with pytest.raises(DeviceError, match='did not answer as its control service'):
    check_cluster(address)


def test_where_nobody_listens_the_address_is_named():
  with socket.create_server(('127.0.0.1', 0)) as server:
    port = server.getsockname()[1]
  with pytest.raises(
    DeviceError, match=rf'no Ray cluster can be reached at 127\.0\.0\.1:{port} \(Connection refused\)'
  ):
    check_cluster(f'127.0.0.1:{port}')


@pytest.mark.parametrize('answers', [False, True])
def test_a_name_that_nobody_resolves_does_not_hold_the_run_up(monkeypatch, answers):
  monkeypatch.setattr(addresses, '_RESOLVE_S', 30.0 if answers else 0.05)
  resolved = threading.Event()

  def resolve(*_, **__):
    if not answers:
      resolved.wait(30.0)
    raise socket.gaierror(-2, 'Name or service not known')

  monkeypatch.setattr(socket, 'getaddrinfo', resolve)
  why = 'Name or service not known' if answers else r'no name server answered for 0\.05 s'
  with pytest.raises(DeviceError, match=rf"at far\.example:6379 \(the name 'far\.example' is not resolved: {why}\)"):
    check_cluster('far.example:6379')
  resolved.set()


@pytest.mark.parametrize('open_one', [False, True])
def test_one_address_of_a_name_that_swallows_all_does_not_hide_another(monkeypatch, address, open_one):
  """The addresses are tried side by side."""
  host, _, port = address.rpartition(':')
  places = [(host, int(port))] if open_one else []
  monkeypatch.setattr(addresses, '_CONNECT_S', 30.0 if open_one else 0.05)
  monkeypatch.setattr(
    socket, 'getaddrinfo',
    lambda *_, **__: [(socket.AF_INET, socket.SOCK_STREAM, 0, '', one) for one in [('swallows', 1), *places]],
  )  # fmt: skip
  swallowed, begin = threading.Event(), addresses._open

  def connect(family, kind, protocol, name, place):
    if place == ('swallows', 1):
      swallowed.wait(30.0)
      raise TimeoutError
    begin(family, kind, protocol, name, place)

  monkeypatch.setattr(addresses, '_open', connect)
  asking(monkeypatch, nodes((host, True)))
  if open_one:
    check_cluster(f'two.example:{port}')
  else:
    with pytest.raises(DeviceError, match=r'\(nobody answered for 0\.05 s\)'):
      check_cluster(f'two.example:{port}')
  swallowed.set()
