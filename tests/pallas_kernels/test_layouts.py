"""Layouts of pages: where each head's keys and values are, and that shapes tell."""

import numpy as np
import pytest

from pallas_kernels import devices
from pallas_kernels.layouts import PageLayout

PLAIN, PAIRED, KV = (5, 2, 4, 3, 8), (5, 2, 2, 3, 16), (5, 1, 4, 3, 16)  # of four heads of 8


@pytest.mark.parametrize('shape, name', [(PLAIN, 'plain'), (PAIRED, 'paired'), (KV, 'kv')])
def test_the_shape_tells_the_layout_and_packing_is_undone(shape, name):
  layout = PageLayout.of(shape, head_dim=8)
  assert layout == PageLayout(name, kv_heads=4, page_size=3, head_dim=8)
  assert layout.page_shape == shape[1:]
  unpacked = np.arange(np.prod(PLAIN)).reshape(PLAIN)
  packed = layout.pack(unpacked)
  assert packed.shape == shape
  np.testing.assert_array_equal(layout.unpack(packed), unpacked)
  np.testing.assert_array_equal(layout.unpack(packed[0]), unpacked[0])  # one page, or any axes before


def test_paired_heads_lie_side_by_side():
  unpacked = np.random.default_rng(0).standard_normal(PLAIN, np.float32)
  packed = PageLayout.of(PAIRED, 8).pack(unpacked)
  np.testing.assert_array_equal(packed[:, :, 1, :, :8], unpacked[:, :, 2])
  np.testing.assert_array_equal(packed[:, :, 1, :, 8:], unpacked[:, :, 3])


def test_a_key_and_its_value_lie_side_by_side():
  unpacked = np.random.default_rng(0).standard_normal(PLAIN, np.float32)
  packed = PageLayout.of(KV, 8).pack(unpacked)
  np.testing.assert_array_equal(packed[:, 0, :, :, :8], unpacked[:, 0])
  np.testing.assert_array_equal(packed[:, 0, :, :, 8:], unpacked[:, 1])


@pytest.mark.parametrize('shape', [(5, 2, 4, 3, 4), (5, 2, 4, 3, 24), (5, 3, 4, 3, 8), (5, 1, 4, 3, 8), (2, 4, 3, 8)])
def test_other_shapes_are_refused(shape):
  with pytest.raises(ValueError, match=r'D = 8 of q'):
    PageLayout.of(shape, head_dim=8)


@pytest.mark.parametrize('kv_heads, head_dim, name', [
  (8, 128, 'plain'), (3, 256, 'plain'), (8, 64, 'paired'), (3, 64, 'kv'), (1, 64, 'kv'), (2, 192, 'paired'),
  (8, 80, 'plain'), (3, 32, 'plain'),
])  # fmt: skip
def test_a_tpu_reads_heads_packed_if_two_of_them_fill_its_lanes(kv_heads, head_dim, name):
  for tpu in devices.TPUS.values():
    assert PageLayout.best(tpu, kv_heads, 16, head_dim) == PageLayout(name, kv_heads, 16, head_dim)
  for platform in ('cpu', 'gpu'):
    assert PageLayout.best(devices.Device(platform, platform), kv_heads, 16, head_dim).name == 'plain'
