"""Pages from one mesh to another: all of them, nothing else, every byte counted, and no waiting for the source."""

import dataclasses
import itertools
import math
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import PageLayout
from pdjax.kv import KVPages, page_bytes
from pdjax.kv.transfer import CrossProcess, DevicePut, HostStaged
from pdjax.kv.transfer.pieces import Cut, batch_bounds, batch_sizes
from pdjax.sharding import make_mesh
from pdjax.types import ModelSpec, TransferSpec
from pdjax.types.span import Span
from tests.tiny import TINY, TINY_8_2, TINY_12_12

PAGE_SIZE = 4
FLOAT32 = jnp.dtype('float32')


@dataclasses.dataclass
class Pool:
  """A worker, as far as a transfer sees it."""

  mesh: jax.sharding.Mesh
  pages: KVPages
  page_shapes: KVPages

  @classmethod
  def random(
    cls, model: ModelSpec, devices, num_pages: int, seed: int, dtype=FLOAT32, layout='auto', page_size=PAGE_SIZE
  ) -> 'Pool':
    mesh = make_mesh(model, devices)
    shapes = KVPages.shapes(model, num_pages, page_size, dtype, mesh, layout)
    rng = np.random.default_rng(seed)

    def fill(leaf):
      values = rng.standard_normal(leaf.shape, np.float32)
      if leaf.dtype == jnp.int8:
        values = np.round(values * 40).clip(-127, 127)
      elif leaf.ndim == 4:  # scales
        values = np.abs(values) / 100
      return jax.device_put(values.astype(leaf.dtype), leaf.sharding)

    return cls(mesh, jax.tree.map(fill, shapes), shapes)

  def values(self) -> list[np.ndarray]:
    """The elements stored in each layer, `[P, 2, K, G, D]` whatever its layout."""
    return [np.array(self.pages.layout.unpack(np.asarray(layer))) for layer in self.pages.layers]

  def numbers(self) -> np.ndarray:
    """The values they stand for, `[P, G, L, 2, K, D]`."""
    numbers = np.stack(self.values()).astype(np.float32)
    if self.pages.scales:
      numbers *= np.stack([np.asarray(scales) for scales in self.pages.scales])[..., None]
    return numbers.transpose(1, 4, 0, 2, 3, 5)


def four_units_at_most(source: Pool, target: Pool) -> TransferSpec:
  """Batches of one unit and of four."""
  return TransferSpec(
    piece_bytes=4 * DevicePut(source, target, TransferSpec()).pieces.unit_bytes(len(source.pages.layers))
  )


# ---------------------------------------------------------------------------- plans


@pytest.mark.parametrize('kv_heads', [1, 2, 3, 4, 6, 8, 12])
def test_every_piece_of_a_target_comes_from_where_its_heads_are(kv_heads):
  cuts = [shards for shards in range(1, kv_heads + 1) if kv_heads % shards == 0]
  for source_shards, target_shards in itertools.product(cuts, cuts):
    cut = Cut.between(kv_heads, source_shards, target_shards)
    per_source, per_target = kv_heads // source_shards, kv_heads // target_shards
    for target_shard in range(target_shards):
      received = []
      for piece in range(cut.target_pieces):
        source_shard, source_piece = cut.source_of(target_shard, piece)
        assert 0 <= source_shard < source_shards and 0 <= source_piece < cut.source_pieces
        first = source_shard * per_source + source_piece * cut.piece_heads
        received += range(first, first + cut.piece_heads)
      assert received == list(range(target_shard * per_target, (target_shard + 1) * per_target))
    assert cut.piece_heads == math.gcd(per_source, per_target)


@pytest.mark.parametrize('most', [1, 2, 5, 16, 28, 91])
def test_batches_add_up_to_the_units_and_are_few(most):
  sizes = batch_bounds(most, 1000)
  assert sizes[0] == 1 and sizes[-1] == most and sizes == tuple(sorted(set(sizes)))
  for units in range(300):
    batches = batch_sizes(units, sizes)
    assert sum(batches) == units and set(batches) <= set(sizes)
    assert all(batches.count(size) < 4 for size in sizes[:-1])  # four of a size would be one of the next, about


def test_a_batch_is_no_larger_than_the_pool_and_has_a_unit_at_least():
  assert batch_bounds(91, 15) == batch_bounds(91, 4) == (1, 4) and batch_bounds(91, 64) == (1, 4, 16, 64)
  assert batch_bounds(5, 5) == (1, 2, 5) and batch_bounds(6, 5) == (1, 4)
  assert batch_bounds(91, 3) == batch_bounds(0, 1000) == (1,)


# ---------------------------------------------------------------------------- moving

WAYS = [
  (TINY, 1, 1), (TINY, 1, 2), (TINY, 2, 1),
  (TINY_8_2, 1, 4), (TINY_8_2, 4, 1), (TINY_8_2, 4, 4), (TINY_8_2, 2, 4), (TINY_8_2, 4, 2),
  (TINY_12_12, 3, 1), (TINY_12_12, 1, 3), (TINY_12_12, 4, 2), (TINY_12_12, 2, 3), (TINY_12_12, 3, 4),
  (TINY_12_12, 2, 6),
]  # fmt: skip
UNLIKE = [
  (TINY_12_12, 1, 3, 'plain', 'paired'), (TINY_12_12, 3, 2, 'paired', 'kv'), (TINY_12_12, 2, 4, 'paired', 'plain'),
  (TINY_12_12, 4, 3, 'kv', 'paired'), (TINY_8_2, 1, 4, 'paired', 'kv'),
]  # fmt: skip


@pytest.mark.parametrize(
  'model, source_tp, target_tp, source_layout, target_layout',
  [*((*way, 'auto', 'auto') for way in WAYS), *UNLIKE],
  ids=lambda x: getattr(x, 'name', None),
)
def test_pages_arrive_alone_and_every_byte_is_counted(
  model, source_tp, target_tp, source_layout, target_layout, monkeypatch
):
  devices = jax.devices()
  source = Pool.random(model, devices[:source_tp], 11, seed=1, layout=source_layout)
  target = Pool.random(model, devices[-target_tp:], 17, seed=2, layout=target_layout)
  transport = DevicePut(source, target, four_units_at_most(source, target))
  seconds = transport.compile()
  assert set(seconds) == {'1 units', '4 units'}

  put_bytes = []
  device_put = jax.device_put

  def counting(array, *args, **kwargs):
    out = device_put(array, *args, **kwargs)
    put_bytes.extend(piece.nbytes for piece in out)
    return out

  ours, theirs = [7, 2, 10, 0, 5, 3], [16, 1, 4, 8, 0, 11]  # a batch of four and two of one
  sent, expected = source.values(), target.values()
  for mine, layer in zip(sent, expected, strict=True):
    layer[theirs] = mine[ours]
  monkeypatch.setattr(jax, 'device_put', counting)
  parcel = transport.send(Span(tuple(ours), tuple(theirs), 0, len(ours) * PAGE_SIZE))
  monkeypatch.undo()
  parcel.wait()
  transport.receive(parcel).block_until_ready()

  assert not any('all-' in program.as_text() for program in transport.source._gathers.values()), 'heads are gathered'
  assert parcel.wire_bytes == sum(put_bytes) == len(ours) * page_bytes(model, PAGE_SIZE, FLOAT32)
  for layer, wanted in zip(target.pages.layers, expected, strict=True):
    for shard in layer.addressable_shards:  # copies of a head included
      here = PageLayout.of(shard.data.shape, model.head_dim)
      first = (shard.index[2].start or 0) * model.kv_heads // layer.shape[2]
      heads = wanted[:, :, first : first + here.kv_heads]
      np.testing.assert_array_equal(here.unpack(np.asarray(shard.data)), heads)
  for layer, wanted in zip(source.values(), sent, strict=True):
    np.testing.assert_array_equal(layer, wanted)


def test_pages_travel_within_one_mesh_and_in_bfloat16():
  bfloat16 = jnp.dtype('bfloat16')
  source, target = (Pool.random(TINY, jax.devices()[:1], 8, seed, bfloat16) for seed in (1, 2))
  transport = DevicePut(source, target, TransferSpec())
  transport.compile()
  parcel = transport.send(Span((1, 2, 3), (0, 1, 2), 0, 3 * PAGE_SIZE))
  transport.receive(parcel).block_until_ready()
  assert parcel.wire_bytes == 3 * page_bytes(TINY, PAGE_SIZE, bfloat16)
  np.testing.assert_array_equal(target.values()[1][:3], source.values()[1][1:4])


def test_batches_are_no_larger_than_the_smaller_pool():
  source, target = (Pool.random(TINY, jax.devices()[:1], pages, 0) for pages in (64, 15))
  assert set(DevicePut(source, target, TransferSpec()).compile()) == {'1 units', '4 units'}


# Source and target: pages of so many tokens, dtypes and tp; the first token and how many.
SPANS = [
  (16, 4, 'float32', 'float32', 1, 3, 8, 40),
  (4, 16, 'float32', 'float32', 3, 2, 20, 12),
  (1, 16, 'float32', 'bfloat16', 2, 4, 5, 30),
  (6, 4, 'bfloat16', 'float32', 4, 1, 2, 16),
  (64, 1, 'float16', 'bfloat16', 1, 1, 63, 9),
  (8, 8, 'float32', 'int8', 3, 4, 16, 24),
  (16, 8, 'int8', 'float32', 4, 3, 8, 32),
  (4, 8, 'int8', 'int8', 1, 2, 4, 20),
  (8, 16, 'bfloat16', 'int8', 2, 1, 24, 16),
]


@pytest.mark.parametrize('way', [DevicePut, HostStaged, CrossProcess])
@pytest.mark.parametrize('page_size, target_size, dtype, target_dtype, tp, target_tp, start, tokens', SPANS)
def test_a_span_of_tokens_moves_between_pages_of_unlike_sizes_and_dtypes(
  page_size, target_size, dtype, target_dtype, tp, target_tp, start, tokens, way
):
  model, rng = TINY_12_12, np.random.default_rng(3)
  ends = (page_size, dtype, jax.devices()[:tp]), (target_size, target_dtype, jax.devices()[-target_tp:])
  source, target = (
    Pool.random(model, devices, 90 // size + 5, seed, jnp.dtype(name), page_size=size)
    for seed, (size, name, devices) in enumerate(ends)
  )
  transport = way(source, target, four_units_at_most(source, target))
  transport.compile()
  token = np.arange(start, start + tokens)
  pages, targets = (
    rng.permutation(pool.pages.num_pages)[: token[-1] // size - start // size + 1]
    for pool, size in ((source, page_size), (target, target_size))
  )
  sent = source.numbers()[pages[token // page_size - start // page_size], token % page_size]
  place = targets[token // target_size - start // target_size], token % target_size
  expected = target.numbers()
  parcel = transport.send(Span(tuple(pages.tolist()), tuple(targets.tolist()), start, tokens))
  parcel.wait()
  transport.receive(parcel).block_until_ready()

  smaller = dtype if jnp.dtype(dtype).itemsize <= jnp.dtype(target_dtype).itemsize else target_dtype
  assert (transport.pieces.dtype, transport.pieces.unit) == (smaller, math.gcd(page_size, target_size))
  assert parcel.wire_bytes == tokens * model.cached_token_bytes(smaller)
  arrived = target.numbers()
  if target_dtype == 'int8' != dtype:
    error = np.abs(arrived[place] - sent)
    assert (error <= np.abs(sent).max(-1, keepdims=True) / 254 * 1.001).all() and error.any()
  else:
    kept = sent if target_dtype == 'int8' else sent.astype(jnp.dtype(target_dtype)).astype(np.float32)
    np.testing.assert_array_equal(arrived[place], kept)
  arrived[place] = expected[place] = 0
  np.testing.assert_array_equal(arrived, expected)


def test_pools_of_unlike_models_and_dtypes_that_do_not_travel_are_refused():
  devices = jax.devices()
  with pytest.raises(ValueError, match=r'pools of unlike models: .* \(2, 2, 8\) and \(2, 12, 8\)'):
    DevicePut(Pool.random(TINY, devices[:1], 4, 0), Pool.random(TINY_12_12, devices[1:2], 4, 0), TransferSpec())
  with pytest.raises(ValueError, match='a pool is float8_e4m3fn, expected one of float32'):
    other = Pool.random(TINY, devices[1:2], 4, 0, jnp.dtype('float8_e4m3fn'))
    DevicePut(Pool.random(TINY, devices[:1], 4, 0), other, TransferSpec())


# ---------------------------------------------------------------------------- not waiting


@pytest.mark.parametrize(
  'model, target_tp', [(TINY, 1), (TINY, 2), (TINY_8_2, 4)], ids=lambda x: getattr(x, 'name', None)
)
def test_send_returns_while_its_source_is_unfinished(model, target_tp):
  devices = jax.devices()
  source = Pool.random(model, devices[:1], 8, seed=1)
  target = Pool.random(model, devices[4 : 4 + target_tp], 8, seed=2)
  transport = DevicePut(source, target, TransferSpec())
  transport.compile()
  release = threading.Event()
  expected = [layer * 2 for layer in source.values()]

  def hold(x):
    release.wait(60)
    return np.asarray(x)

  def double_when_released(busy, pages):
    held = jax.pure_callback(hold, jax.ShapeDtypeStruct((), np.float32), busy[0, 0])
    return jax.tree.map(lambda layer: layer * 2 + held * 0, pages)

  # A program with a callback runs inside its own dispatch, unless its arguments are not ready yet.
  heavy = jax.jit(lambda x: jax.lax.fori_loop(0, 60, lambda i, x: x @ x, x))
  zeros = jax.device_put(np.zeros((800, 800), np.float32), devices[0])
  heavy, held = heavy.lower(zeros).compile(), jax.jit(double_when_released).lower(zeros, source.pages).compile()
  try:
    source.pages = held(heavy(zeros), source.pages)
    parcel = transport.send(Span((5, 1, 6, 2, 7), (0, 1, 2, 3, 4), 0, 5 * PAGE_SIZE))
    moving = [piece.values for _, pieces in parcel.batches for piece in pieces]
    assert not any(layer.is_ready() for layer in source.pages.layers)
    assert not any(piece.is_ready() for piece in moving)
    assert not release.is_set()
  finally:
    release.set()
  parcel.wait()
  transport.receive(parcel).block_until_ready()
  for layer, wanted in zip(target.values(), expected, strict=True):
    np.testing.assert_array_equal(layer[:5], wanted[[5, 1, 6, 2, 7]])
