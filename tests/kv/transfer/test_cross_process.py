"""The particulars of the way between processes; the pages it moves are tested in `test_ends.py`."""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pytest

from pdjax.kv.transfer.cross_process import CrossProcess, Receiver, RemotePool, Sender, Server, describe_pool
from pdjax.sharding import make_mesh
from pdjax.types import TransferSpec
from pdjax.types.cluster import DeviceError
from pdjax.types.span import Span
from tests.kv.transfer.pools import PAGE_SIZE, Pool, four_units_at_most
from tests.tiny import TINY, TINY_8_2, TINY_12_12

OURS, THEIRS = (7, 2, 10, 0, 5, 3), (16, 1, 4, 8, 0, 11)
SPAN = Span(OURS, THEIRS, 0, 6 * PAGE_SIZE)


def on(device: jax.Device, *shape: int, dtype=np.float32) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.SingleDeviceSharding(device))


def ready_within(arrays, seconds: float) -> bool:
  """Whether arrays are there after so long. Those that are not have to come later: no thread may wait at the end."""

  def wait() -> None:
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      jax.block_until_ready(arrays)

  thread = threading.Thread(target=wait, daemon=True)
  thread.start()
  thread.join(seconds)
  return not thread.is_alive()


@dataclasses.dataclass
class Halves:
  """The two ends of a way, which know of each other what a handshake tells."""

  source: Pool
  target: Pool
  sender: Sender
  receiver: Receiver


def halves(model=TINY_12_12, source_tp=3, target_tp=2, **kwargs) -> Halves:
  devices = jax.devices()
  source = Pool.random(model, devices[:source_tp], 11, seed=1)
  target = Pool.random(model, devices[-target_tp:], 17, seed=2, **kwargs)
  servers = Server(devices[0]), Server(devices[-1])
  theirs, ours = (RemotePool.of(describe_pool(model.cache[0], pool)) for pool in (target, source))
  spec = four_units_at_most(source, target)
  sender = Sender(source, theirs, spec, servers[0])
  receiver = Receiver(ours, target, spec, servers[1], servers[0].address)
  sender.compile()
  receiver.compile()
  return Halves(source, target, sender, receiver)


@pytest.fixture(scope='module')
def way() -> Halves:
  return halves()


@pytest.fixture(scope='module')
def servers() -> tuple[Server, Server]:
  return Server(jax.devices()[0]), Server(jax.devices()[1])


# ---------------------------------------------------------------------------- halves


def test_halves_that_know_only_a_description_of_each_other_move_pages_whole(way):
  expected = way.target.values()
  for mine, layer in zip(way.source.values(), expected, strict=True):
    layer[[*THEIRS]] = mine[[*OURS]]
  offer = way.sender.offer(1, SPAN)
  parcel = way.receiver.pull(1, offer.manifest, SPAN)
  parcel.wait()
  way.receiver.receive(parcel).block_until_ready()
  for layer, wanted in zip(way.target.values(), expected, strict=True):
    np.testing.assert_array_equal(layer, wanted)
  assert parcel.wire_bytes == SPAN.tokens * TINY_12_12.cached_token_bytes('float32')
  assert parcel.num_pieces == len(offer.manifest) > 6


@pytest.mark.parametrize('model, tp, target_tp', [(TINY, 1, 2), (TINY_8_2, 2, 4), (TINY_12_12, 3, 4)])
def test_both_halves_work_out_the_same_pieces(model, tp, target_tp):
  pools = [Pool.random(model, devices, 9, 0) for devices in (jax.devices()[:tp], jax.devices()[-target_tp:])]
  here, there = (RemotePool.of(describe_pool(model.cache[0], pool)) for pool in pools)
  server = Server(jax.devices()[0])
  spec = TransferSpec(granularity='layers', layer_groups=2)
  ends = Sender(pools[0], there, spec, server), Receiver(here, pools[1], spec, server, server.address)
  assert ends[0].plan('kv') == ends[1].plan('kv')
  (kind,) = model.cache
  assert describe_pool(kind, there) == describe_pool(kind, pools[1])
  assert not hasattr(there, 'pages')


def test_other_pieces_than_were_agreed_are_refused_naming_both(way):
  offer = way.sender.offer(2, SPAN)
  for manifest in (
    tuple((shape, 'int32') for shape, _ in offer.manifest),  # which JAX would take for what it is not
    tuple(((*shape[:-1], 2 * shape[-1]), dtype) for shape, dtype in offer.manifest),
    offer.manifest[:-1],
  ):
    with pytest.raises(ValueError, match=r'transfer 2 offers pieces of .*, expected .*×float32\[1, 4, 2, 2, 2, 4, 8\]'):
      way.receiver.pull(2, manifest, SPAN)
  parcel = way.receiver.pull(2, offer.manifest, SPAN)
  assert ready_within([pieces for _, pieces in parcel.batches], 30)


def test_what_nobody_will_pull_is_let_go(way):
  offer = way.sender.offer(3, SPAN)
  way.sender.withdraw(offer.without_arrays())
  time.sleep(0.3)
  parcel = way.receiver.pull(3, offer.manifest, SPAN)
  assert not ready_within([pieces for _, pieces in parcel.batches], 0.5)
  way.sender.offer(3, SPAN)
  parcel.wait()


def test_both_halves_in_one_process_are_a_transport(way):
  transport = CrossProcess(way.source, way.target, four_units_at_most(way.source, way.target))
  assert set(transport.compile()) == {'1 units', '4 units'}
  parcel = transport.send(SPAN)
  parcel.wait_gathered()
  parcel.wait()
  transport.receive(parcel).block_until_ready()
  np.testing.assert_array_equal(way.target.values()[1][[*THEIRS]], way.source.values()[1][[*OURS]])


# ---------------------------------------------------------------------------- servers


def test_a_pull_of_a_number_that_nobody_offered_never_ends_and_others_go_on(servers):
  source, target = servers
  device = jax.devices()[1]
  lost = target.pull(source.address, 404, [on(device, 8)])
  assert not ready_within(lost, 0.3)
  for number in range(405, 409):
    source.offer(number, [jax.device_put(np.full(8, number, np.float32), jax.devices()[0])])
    (array,) = target.pull(source.address, number, [on(device, 8)])
    assert ready_within(array, 30) and float(array[0]) == number
  assert not lost[0].is_ready()
  source.offer(404, [jax.device_put(np.zeros(8, np.float32), jax.devices()[0])])
  assert ready_within(lost, 30)


def test_a_pull_of_another_length_raises_and_others_go_on(servers):
  source, target = servers
  array = jax.device_put(np.arange(8, dtype=np.float32), jax.devices()[0])
  source.offer(501, [array])
  (short,) = target.pull(source.address, 501, [on(jax.devices()[1], 4)])
  with pytest.raises(Exception, match='size'):
    short.block_until_ready()
  source.offer(502, [array])
  (whole,) = target.pull(source.address, 502, [on(jax.devices()[1], 8)])
  np.testing.assert_array_equal(whole, array)


def test_pieces_may_be_pulled_before_they_are_computed(servers):
  source, target = servers
  release = threading.Event()

  def hold(x):
    release.wait(60)
    return np.asarray(x)

  heavy = jax.jit(lambda x: jax.lax.fori_loop(0, 60, lambda i, x: x @ x, x))
  late = jax.jit(lambda x: jax.pure_callback(hold, jax.ShapeDtypeStruct((4,), np.float32), x[0, :4]) + 1)
  zeros = jax.device_put(np.zeros((400, 400), np.float32), jax.devices()[0])
  late(heavy(zeros)) if release.set() else jax.block_until_ready(late(heavy(zeros)))
  release.clear()
  try:
    piece = late(heavy(zeros))
    source.offer(601, [piece])
    (pulled,) = target.pull(source.address, 601, [on(jax.devices()[1], 4)])
    assert not piece.is_ready() and not pulled.is_ready()
  finally:
    release.set()
  np.testing.assert_array_equal(pulled, np.ones(4))


def test_nothing_listens_beyond_this_machine(servers):
  ports = {int(server.address.rpartition(':')[2]) for server in servers}
  heard = {one.laddr for one in psutil.Process().net_connections('tcp') if one.status == psutil.CONN_LISTEN}
  assert ports <= {address.port for address in heard}
  assert {address.ip for address in heard} == {'127.0.0.1'}


def test_where_there_is_no_transfer_server_the_reason_is_said(monkeypatch):
  from jax.experimental import transfer

  def refuse(*_, **__):
    raise RuntimeError('UNIMPLEMENTED: not on this client')

  monkeypatch.setattr(transfer, 'start_transfer_server', refuse)
  with pytest.raises(DeviceError, match=r"'cross_process' is not available: JAX .* for cpu devices at .*UNIMPLEMENTED"):
    Server(jax.devices()[0])


def test_an_address_that_is_not_of_this_machine_is_refused():
  with pytest.raises(DeviceError, match=r'at 203\.0\.113\.1 '):
    Server(jax.devices()[0], '203.0.113.1')


# ---------------------------------------------------------------------------- another process

OTHER = """
import jax, sys, time
jax.config.update('jax_platforms', 'cpu')
import numpy as np
from pdjax.kv.transfer.cross_process import Server
server = Server(jax.devices()[0])
for number in range(1, 5):
  server.offer(number, [jax.device_put(np.full(1 << 20, number, np.float32))])
print(server.address, flush=True)
time.sleep(120)
"""


def test_a_killed_sender_raises_soon_and_others_go_on(servers):
  own, target = servers
  device = jax.devices()[1]
  with subprocess.Popen([sys.executable, '-c', OTHER], stdout=subprocess.PIPE, text=True) as other:
    try:
      address = other.stdout.readline().strip()
      (array,) = target.pull(address, 1, [on(device, 1 << 20)])
      assert float(array[-1]) == 1.0
      never = target.pull(address, 99, [on(device, 8)])
      assert not ready_within(never, 0.2)
      begin = time.perf_counter()
      os.kill(other.pid, signal.SIGKILL)
      with pytest.raises(Exception, match=r'.'):
        jax.block_until_ready(never)
      assert time.perf_counter() - begin < 5.0  # half a second on a machine that does nothing else
    finally:
      other.kill()
  own.offer(701, [jnp.ones(8)])
  (array,) = target.pull(own.address, 701, [on(device, 8)])
  np.testing.assert_array_equal(array, np.ones(8))


def test_meshes_of_other_processes_have_shapes_and_no_devices():
  pool = Pool.random(TINY_8_2, jax.devices()[:4], 9, 0)
  remote = RemotePool.of(describe_pool(TINY_8_2.cache[0], pool))
  assert remote.mesh.shape == make_mesh(TINY_8_2, jax.devices()[:4]).shape
  assert [leaf.shape for leaf in remote.page_shapes.layers] == [leaf.shape for leaf in pool.page_shapes.layers]
