"""Checksums of what travels: taken where it leaves and where it has arrived, and compared before it is written."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

_SALT = np.uint32(0x9E3779B9)


class CorruptError(RuntimeError):
  """Other keys and values arrived than were sent."""


class Checked:
  """Checksums of pieces as they left, beside the pieces as they arrived.

  Each unit of a piece has a checksum of 64 bits that depends on every bit and its place, the unit's among the others
  too, so that pages in another order are found as damaged ones are: random damage stays unseen with odds of 2^-64.
  """

  def __init__(self, pairs: Iterable[tuple[jax.Array, jax.Array]]):
    """Pairs of `checksums` of a piece and what came of it."""
    self._pairs = list(pairs)

  def compare(self) -> None:
    """Read what has arrived.

    Raises:
      CorruptError: if it is not what left.
    """
    pairs = [(sums, checksums(landed)) for sums, landed in self._pairs]
    differ = [np.any(np.asarray(ours) != np.asarray(theirs), axis=1) for ours, theirs in pairs]
    if any(map(np.any, differ)):
      damaged, all_units = sum(int(one.sum()) for one in differ), sum(one.size for one in differ)
      raise CorruptError(f'{damaged} of {all_units} pieces of pages are not those that were sent')


@jax.jit
def checksums(piece: jax.Array) -> jax.Array:
  """Two sums of each unit, `[n, 2]` uint32, of a piece `[1, n, ...]`.

  Every element is mixed with its place by a bijection of 32 bits and the results are added, once as they are and once
  mixed again: one element that changed always changes the first sum.
  """
  bits = jax.lax.bitcast_convert_type(piece[0], jnp.dtype(f'uint{8 * piece.dtype.itemsize}'))
  words = bits.reshape(bits.shape[0], -1).astype(jnp.uint32)  # [n, W]
  place = jax.lax.iota(jnp.uint32, words.size).reshape(words.shape)
  first = _mixed(words ^ _mixed(place + _SALT))
  return jnp.stack([jnp.sum(first, axis=1), jnp.sum(_mixed(first + _SALT), axis=1)], axis=1)


def _mixed(x: jax.Array) -> jax.Array:
  """A bijection of 32 bits in which each bit depends on all (the finalizer of MurmurHash3, public domain)."""
  x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
  return x ^ (x >> 16)
