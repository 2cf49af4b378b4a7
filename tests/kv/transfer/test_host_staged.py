"""The particulars of the way over the host's memory; the pages it moves are tested in `test_ends.py`."""

import jax
import numpy as np
import pytest

from pdjax.kv.transfer import HostStaged
from pdjax.kv.transfer.host_staged import unaligned
from pdjax.types.span import Span
from tests.kv.transfer.pools import PAGE_SIZE, Pool, four_units_at_most
from tests.tiny import TINY_12_12


@pytest.mark.parametrize('size', [1, 63, 64, 4096, 1 << 20])
def test_a_buffer_that_is_written_again_changes_no_array_made_of_it(size):
  buffer = unaligned(size)
  assert buffer.nbytes == size and buffer.ctypes.data % 64
  buffer[:] = 1
  array = jax.device_put(buffer, jax.devices()[1]).block_until_ready()
  buffer[:] = 2
  assert (np.asarray(array) == 1).all()


def test_memory_that_is_aligned_may_be_shared_with_a_device_so_it_is_no_buffer():
  room = np.empty(4096 + 64, np.uint8)
  aligned = room[-room.ctypes.data % 64 :][:4096]
  array = jax.device_put(aligned, jax.devices()[1], may_alias=False).block_until_ready()
  shared = array.unsafe_buffer_pointer() == aligned.ctypes.data
  array = jax.device_put(unaligned(4096), jax.devices()[1]).block_until_ready()
  assert shared and array.unsafe_buffer_pointer() % 64 == 0


def test_no_more_than_two_pieces_are_on_the_host_and_nothing_travels_before_it_is_waited_for():
  devices = jax.devices()
  source = Pool.random(TINY_12_12, devices[:3], 32, 1)
  target = Pool.random(TINY_12_12, devices[-2:], 32, 2)
  transport = HostStaged(source, target, four_units_at_most(source, target))
  transport.compile()
  before = target.values()
  parcel = transport.send(Span(tuple(range(9)), tuple(range(20, 29)), 0, 9 * PAGE_SIZE))
  assert parcel.batches == ()
  parcel.wait()
  assert [len(targets) for targets, _ in parcel.batches] == [4, 4, 1] and not parcel.gathered
  heads = transport.pieces.cut.piece_heads
  piece_bytes = 4 * 2 * TINY_12_12.num_layers * heads * PAGE_SIZE * TINY_12_12.head_dim * 4
  assert [buffer._memory.nbytes for buffer in transport._buffers] == [piece_bytes, piece_bytes]
  for layer, unchanged in zip(target.values(), before, strict=True):
    np.testing.assert_array_equal(layer, unchanged)
  transport.receive(parcel).block_until_ready()
  for ours, theirs in zip(source.values(), target.values(), strict=True):
    np.testing.assert_array_equal(ours[:9], theirs[20:29])
