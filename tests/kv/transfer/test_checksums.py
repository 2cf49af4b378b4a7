"""A checksum tells every change of a page, and of the order of pages."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pdjax.kv.transfer.checksums import Checked, CorruptError, checksums

DTYPES = ['float32', 'bfloat16', 'float16', 'int8']


def piece(dtype: str, seed: int = 0, units: int = 4) -> np.ndarray:
  rng = np.random.default_rng(seed)
  values = rng.integers(-120, 120, (1, units, 2, 2, 1, 4, 8))
  return values.astype(ml_dtypes.bfloat16 if dtype == 'bfloat16' else dtype)


@pytest.mark.parametrize('dtype', DTYPES)
def test_every_bit_of_a_unit_changes_its_checksum_and_no_other(dtype):
  whole = piece(dtype)
  before = np.asarray(checksums(whole))
  assert before.shape == (4, 2) and before.dtype == np.uint32
  rng = np.random.default_rng(1)
  for _ in range(50):
    damaged = whole.copy()
    unit = rng.integers(4)
    flat = damaged[0, unit].reshape(-1).view(np.uint8)
    flat[rng.integers(flat.size)] ^= 1 << rng.integers(8)
    changed = np.asarray(checksums(damaged)) != before
    assert changed[unit].any() and not np.delete(changed, unit, axis=0).any()


def test_units_in_another_order_have_other_checksums():
  whole = piece('float32')
  before = np.asarray(checksums(whole))
  after = np.asarray(checksums(whole[:, [1, 0, 2, 3]]))
  assert (before[:2] != after[:2]).any(axis=1).all() and (before[2:] == after[2:]).all()
  swapped = whole.copy()
  swapped[0, 0, ..., [0, 1]] = swapped[0, 0, ..., [1, 0]]  # two elements of a head
  assert (np.asarray(checksums(swapped))[0] != before[0]).any()


def test_checksums_of_random_pages_do_not_meet():
  sums = np.asarray(checksums(np.concatenate([piece('int8', seed, 512) for seed in range(8)], axis=1)))
  assert len(np.unique(sums, axis=0)) == len(sums)
  bits = np.unpackbits(sums.view(np.uint8), axis=1).mean(axis=0)
  assert (np.abs(bits - 0.5) < 0.06).all()  # each bit is set in half of them


def test_what_arrives_as_it_left_is_let_through_and_nothing_else():
  device, sent = jax.devices()[1], jnp.asarray(piece('float32'))
  Checked([(checksums(sent), jax.device_put(sent, device))]).compare()

  here = np.array(sent)
  here[0, 2, 0, 0, 0, 0, 0] += 1
  with pytest.raises(CorruptError, match='1 of 4 pieces of pages are not those that were sent'):
    Checked([(checksums(sent), jax.device_put(here, device))]).compare()
