"""Pages from one mesh to another: all of them, nothing else, every byte counted, and no waiting for the source."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import PageLayout
from pdjax.kv.transfer import DevicePut
from pdjax.types import TransferSpec
from pdjax.types.span import Span
from tests.kv.transfer.pools import PAGE_SIZE, Pool, four_units_at_most
from tests.tiny import TINY, TINY_8_2, TINY_12_12

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
  assert parcel.wire_bytes == sum(put_bytes) == len(ours) * PAGE_SIZE * model.cached_token_bytes('float32')
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
  assert parcel.wire_bytes == 3 * PAGE_SIZE * TINY.cached_token_bytes('bfloat16')
  np.testing.assert_array_equal(target.values()[1][:3], source.values()[1][1:4])


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
