r"""The speed at which KV travels, beside the fastest that could carry the same bytes, in the same run.

python -m experiments.bench_transfer
python -m experiments.bench_transfer --transport=cross_process --mib=8,32 --json=transfer.json

`device_put` and `host_staged`: from gathered pieces on one device to the last of them on another, beside a plain copy
of as many bytes into a standing buffer; off CPU, beside as many bytes in one array, put there, or fetched to the host
and put there. (With one device only over the host: on it nothing travels.) `cross_process`: two processes on this
machine, and beside it a bare pull of `jax.experimental.transfer`, arrays of the same shapes offered under one number.
"pulled" is from the pull to the last piece on its device; "in all" begins with the gather and ends when the target's
pages are written.
"""

import contextlib
import functools
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from absl import app, flags
from rich.console import Console
from rich.table import Table

from experiments.rows import row, save_rows
from pdjax.engine.build import prepare_devices
from pdjax.engine.host_memory import keep_freed_memory
from pdjax.kv.pages import KVPages
from pdjax.kv.transfer import TRANSPORTS, HostStaged, Parcel
from pdjax.kv.transfer.cross_process import Receiver, RemotePool, Sender, Server, describe_pool
from pdjax.sharding import make_mesh
from pdjax.types import ModelSpec, TransferSpec
from pdjax.types.handshake import Manifest, PoolShape
from pdjax.types.span import Span
from pdjax.types.transfer import TransportName

FLAGS = flags.FLAGS
_TRANSPORTS = ['device_put', 'host_staged', 'cross_process']
_TRANSPORT = flags.DEFINE_multi_enum('transport', _TRANSPORTS, _TRANSPORTS, 'What to measure; all by default.')
_MIB = flags.DEFINE_list('mib', ['8', '32', '96'], 'Sizes of a transfer in MiB.')
_REPEATS = flags.DEFINE_integer('repeats', 7, 'Transfers of which the median counts.', lower_bound=1)
_PLATFORM = flags.DEFINE_enum('platform', 'cpu', ['cpu', 'gpu', 'tpu'], 'Devices to measure on.')
_JSON = flags.DEFINE_string('json', None, 'Write rows of name, value, unit to this file.')
_SOURCE = flags.DEFINE_bool('source', False, 'Be the process that KV leaves; the command starts it by itself.')

_MODEL = ModelSpec.smollm2_135m()
(_KIND,) = _MODEL.cache
_PAGE_SIZE = 16
_GRANULARITY = TransferSpec(granularity='request')


class _Pool:
  """Pages on a device of this process, by default the first."""

  def __init__(self, num_pages: int, device: jax.Device | None = None):
    self.mesh = make_mesh(_MODEL, [device or jax.devices()[0]])
    self.page_shapes = KVPages.shapes(_KIND, num_pages, _PAGE_SIZE, np.dtype(np.float32), self.mesh, 'plain')
    rng = np.random.default_rng(0)
    self.pages = jax.tree.map(
      lambda leaf: jax.device_put(rng.standard_normal(leaf.shape, np.float32), leaf.sharding), self.page_shapes
    )


def pages_of(mib: float) -> int:
  """The fewest pages of at least `mib` MiB."""
  return math.ceil(mib * 2**20 / (_PAGE_SIZE * _MODEL.cached_token_bytes('float32')))


def span_of(pages: int) -> Span:
  """The first pages of both pools."""
  numbers = tuple(range(pages))
  return Span(numbers, numbers, 0, pages * _PAGE_SIZE)


# ---------------------------------------------------------------------------- between two processes


def serve_source() -> None:
  """Answer JSON lines: offer pages as KV, or arrays of the same shapes as they are."""
  prepare_devices(_PLATFORM.value, 1)

  def answer(value: Any) -> None:
    print(json.dumps(value), flush=True)

  request = json.loads(sys.stdin.readline())
  pool, server = _Pool(request['pages']), Server(jax.devices()[0])
  remote = RemotePool.of(_from_plain(request['pool']))
  sender = Sender(pool, remote, _GRANULARITY, server)
  sender.compile()
  answer({'address': server.address, 'pool': _plain(describe_pool(_KIND, pool))})
  for line in sys.stdin:
    request = json.loads(line)
    number = request['number']
    if request['what'] == 'kv':
      offer = sender.offer(number, span_of(request['pages']))
      answer(offer.manifest)
      offer.wait()
    else:
      device = jax.devices()[0]
      arrays = [jax.device_put(np.ones(shape, np.dtype(dtype)), device) for shape, dtype in request['manifest']]
      server.offer(number, jax.block_until_ready(arrays))
    answer('ready')


def _plain(pool: PoolShape) -> list[Any]:
  return [pool.num_pages, pool.page_size, pool.dtype, pool.layout, list(pool.mesh)]


def _from_plain(plain: list[Any]) -> PoolShape:
  num_pages, page_size, dtype, layout, (kv, group) = plain
  return PoolShape(_KIND, num_pages, page_size, dtype, layout, (kv, group))


class _Source:
  """The other process, as this one sees it."""

  def __init__(self, process: subprocess.Popen[str]):
    self._process = process

  def ask(self, request: dict[str, Any]) -> Any:
    """Send a request and wait for the first line of its answer."""
    assert self._process.stdin is not None
    self._process.stdin.write(json.dumps(request) + '\n')
    self._process.stdin.flush()
    return self.more()

  def more(self) -> Any:
    """Wait for another line."""
    assert self._process.stdout is not None
    line = self._process.stdout.readline()
    if not line:
      raise RuntimeError('the process that KV leaves has ended; run it by itself to see why, with --source.')
    return json.loads(line)


@contextlib.contextmanager
def _other_process() -> Iterator[_Source]:
  command = [sys.executable, '-m', 'experiments.bench_transfer', '--source', f'--platform={_PLATFORM.value}']
  with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
    try:
      yield _Source(process)
    finally:
      process.kill()


class _Way:
  """From the other process to this one, with the seconds that each kind of transfer takes."""

  def __init__(self, source: _Source, num_pages: int):
    self._source, self._pool, self._server = source, _Pool(num_pages), Server(jax.devices()[0])
    said = source.ask({'pages': num_pages, 'pool': _plain(describe_pool(_KIND, self._pool))})
    self._address: str = said['address']
    remote = RemotePool.of(_from_plain(said['pool']))
    self._receiver = Receiver(remote, self._pool, _GRANULARITY, self._server, self._address)
    self._receiver.compile()
    self._numbers = itertools.count(1)

  def bare(self, pages: int) -> float:
    """Seconds to pull arrays of the shapes of so many pages' pieces."""
    number = next(self._numbers)
    shapes = self._receiver.expected(span_of(pages))
    manifest = [(list(shape.shape), shape.dtype.name) for shape in shapes]
    self._source.ask({'what': 'bare', 'number': number, 'manifest': manifest})
    begin = time.perf_counter()
    jax.block_until_ready(self._server.pull(self._address, number, shapes))
    return time.perf_counter() - begin

  def pulled(self, pages: int) -> float:
    """Seconds to pull so many pages that have been gathered."""
    number, manifest = self._offered(pages)
    self._source.more()
    begin = time.perf_counter()
    self._pull(number, manifest, pages).wait()
    return time.perf_counter() - begin

  def in_all(self, pages: int) -> float:
    """Seconds from asking for so many pages until they are written."""
    begin = time.perf_counter()
    parcel = self._pull(*self._offered(pages), pages)
    parcel.wait()
    self._receiver.receive(parcel).block_until_ready()
    seconds = time.perf_counter() - begin
    self._source.more()
    return seconds

  def _offered(self, pages: int) -> tuple[int, Manifest]:
    number = next(self._numbers)
    said = self._source.ask({'what': 'kv', 'number': number, 'pages': pages})
    return number, tuple((tuple(shape), dtype) for shape, dtype in said)

  def _pull(self, number: int, manifest: Manifest, pages: int) -> Parcel:
    return self._receiver.pull(number, manifest, span_of(pages))


def cross_process(sizes_mib: list[float], repeats: int) -> Iterator[tuple[float, float, float, float]]:
  """For each size: its MiB, and GB/s of a bare pull, of our pull, and of ours from gather to written pages."""
  with _other_process() as source:
    way = _Way(source, max(map(pages_of, sizes_mib)))
    for mib in sizes_mib:
      pages = pages_of(mib)
      size = pages * _PAGE_SIZE * _MODEL.cached_token_bytes('float32')
      kinds = way.bare, way.pulled, way.in_all
      rounds = [[kind(pages) for kind in kinds] for _ in range(repeats + 1)]  # in turns: all meet the same neighbours
      medians = map(statistics.median, zip(*rounds[1:], strict=True))  # the first of each is slow
      bare, pulled, whole = (size / seconds / 1e9 for seconds in medians)
      yield size / 2**20, bare, pulled, whole


def cross_process_rows(console: Console) -> list[dict[str, Any]]:
  """Measure, print a table, and return its rows."""
  table = Table(title='cross_process, between two processes of this machine')
  for column in ('MiB', 'bare pull GB/s', 'pulled GB/s', 'of bare', 'in all GB/s'):
    table.add_column(column, justify='right')
  rows = []
  for mib, bare, pulled, whole in cross_process([float(size) for size in _MIB.value], _REPEATS.value):
    table.add_row(f'{mib:.1f}', f'{bare:.2f}', f'{pulled:.2f}', f'{pulled / bare:.0%}', f'{whole:.2f}')
    name = f'cross_process, {mib:.0f} MiB'
    rows.append(row(name, pulled, 'GB/s', peer='bare jax.experimental.transfer pull', peer_value=bare))
    rows.append(row(f'{name}, from gather to written pages', whole, 'GB/s'))
  console.print(table)
  return rows


# ---------------------------------------------------------------------------- within this process


def in_process(transport: TransportName, sizes_mib: list[float], repeats: int) -> Iterator[tuple[float, float, float]]:
  """For each size: its MiB, and GB/s of as many bytes copied plainly, and of pieces once they are gathered."""
  most = max(map(pages_of, sizes_mib))
  devices = jax.devices()
  ends = devices[0], devices[min(1, len(devices) - 1)]
  source, target = (_Pool(most, device) for device in ends)
  way = TRANSPORTS[transport](source, target, _GRANULARITY)
  way.compile()
  for mib in sizes_mib:
    pages = pages_of(mib)
    size = pages * _PAGE_SIZE * _MODEL.cached_token_bytes('float32')
    plainly = _copying(transport, size, *ends)
    rounds = [(plainly(), _sent_s(way, pages)) for _ in range(repeats + 1)]
    copied, sent = (size / statistics.median(seconds) / 1e9 for seconds in zip(*rounds[1:], strict=True))  # first: slow
    yield size / 2**20, copied, sent


def _copying(transport: TransportName, size: int, source: jax.Device, target: jax.Device) -> Callable[[], float]:
  """A plain copy of so many bytes as devices allow: what returns its seconds when it is called."""
  if source.platform == 'cpu':
    plain, standing = np.ones(size, np.uint8), np.zeros(size, np.uint8)
    return lambda: _seconds(lambda: np.copyto(standing, plain))
  array = jax.device_put(np.ones(size, np.uint8), source)

  def put() -> float:
    fresh = jax.block_until_ready(array + 1)  # an array remembers what it was on the host
    taken = np.asarray if transport == 'host_staged' else lambda it: it
    return _seconds(lambda: jax.block_until_ready(jax.device_put(taken(fresh), target)))

  return put


def _seconds(call: Callable[[], Any]) -> float:
  begin = time.perf_counter()
  call()
  return time.perf_counter() - begin


def _sent_s(way: Any, pages: int) -> float:
  """Seconds of the pieces of some pages from device to device, gathered before."""
  batches = way.source.gather(span_of(pages))
  jax.block_until_ready([batch.pieces for batch in batches])
  begin = time.perf_counter()
  if isinstance(way, HostStaged):
    jax.block_until_ready([way.carry(batch)[0] for batch in batches])
  else:
    pieces = [piece for batch in batches for piece in way.source.leaving(batch)]
    arrived = iter(way.put(pieces, way.devices_of(batches)))
    jax.block_until_ready([way.target.assemble(batch.shape, arrived) for batch in batches])
  return time.perf_counter() - begin


def in_process_rows(transport: TransportName, console: Console) -> list[dict[str, Any]]:
  """Measure, print a table, and return its rows."""
  if transport == 'device_put' and len(jax.devices()) == 1:
    console.print('device_put: there is one device, so nothing travels')
    return []
  table = Table(title=f'{transport}, within this process')
  peer = 'a copy into a standing buffer' if _PLATFORM.value == 'cpu' else 'one array'
  for column in ('MiB', f'{peer} GB/s', 'sent GB/s', 'of it'):
    table.add_column(column, justify='right')
  rows = []
  for mib, copied, sent in in_process(transport, [float(size) for size in _MIB.value], _REPEATS.value):
    table.add_row(f'{mib:.1f}', f'{copied:.2f}', f'{sent:.2f}', f'{sent / copied:.0%}')
    rows.append(row(f'{transport}, {mib:.0f} MiB', sent, 'GB/s', peer=peer, peer_value=copied))
  console.print(table)
  return rows


MEASURED: dict[str, Callable[[Console], list[dict[str, Any]]]] = {
  'device_put': functools.partial(in_process_rows, 'device_put'),
  'host_staged': functools.partial(in_process_rows, 'host_staged'),
  'cross_process': cross_process_rows,
}


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments {argv[1:]}; options begin with --.')
  if _SOURCE.value:
    serve_source()
    return
  if _PLATFORM.value == 'cpu':
    keep_freed_memory()  # as the engine does
  else:
    os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')  # two processes share a device
  prepare_devices(_PLATFORM.value, 2)
  rows: list[dict[str, Any]] = []
  for transport in dict.fromkeys(_TRANSPORT.value):
    rows += MEASURED[transport](Console())
  save_rows(_JSON.value, rows)


if __name__ == '__main__':
  app.run(main)
