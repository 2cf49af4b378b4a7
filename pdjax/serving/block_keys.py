"""Keys of blocks of tokens: two are equal where the tokens, all before them, and what made them are equal."""

import array
import hashlib
import json
from collections.abc import Sequence

import numpy as np

KEY_BYTES = 16
NO_PARENT = bytes(KEY_BYTES)  # of the first block of a sequence


class BlockHasher:
  """Hashes the blocks of sequences that are made in one way, for one tenant.

  The key of a block is a keyed BLAKE2b (RFC 7693) of 128 bits over the key of the block before it and its tokens as
  little-endian int32. What made it and for whom is in BLAKE2b's own key, so that no tokens of another tenant give the
  same. It depends on nothing of a process, a run or a version of Python.

  Args:
    block_tokens: Tokens of a block.
    made: The way in which the blocks are made: the model, its weights and the dtypes that their numbers went through.
    salt: The tenant, or whatever else is to keep blocks apart.
  """

  def __init__(self, block_tokens: int, made: Sequence[str] = (), salt: str = ''):
    self.block_tokens = block_tokens
    text = json.dumps([block_tokens, [*made], salt])
    secret = hashlib.blake2b(text.encode('utf-8', 'surrogatepass'), digest_size=32).digest()
    self._empty = hashlib.blake2b(digest_size=KEY_BYTES, key=secret)

  def keys(self, tokens: Sequence[int] | np.ndarray, parent: bytes = NO_PARENT) -> bytes:
    """The keys of the whole blocks of some tokens, one behind the other; those that fill no block have none.

    Args:
      tokens: Token ids.
      parent: The key of the block before them.
    """
    if not len(tokens):
      return b''
    data = np.asarray(as_array(tokens), '<i4').tobytes()
    size = 4 * self.block_tokens
    begin_anew, found = self._empty.copy, []
    for start in range(0, len(data) - size + 1, size):
      block = begin_anew()
      block.update(parent)
      block.update(data[start : start + size])
      parent = block.digest()
      found.append(parent)
    return b''.join(found)


def stand_ins(block_hashes: Sequence[int], block_size: int, num_tokens: int) -> np.ndarray:
  """Tokens in place of those that nobody knows: equal where the blocks are, and unlike any others.

  Args:
    block_hashes: The id of each block, each of 64 bits.
    block_size: Tokens of a block, two at least.
    num_tokens: Tokens in all; those behind the last block have none.

  Returns:
    `[N]` int32, at most `num_tokens`.
  """
  ids = np.array(block_hashes, np.uint64)
  tokens = np.empty((len(ids), block_size), np.int32)
  tokens[:] = -1 - np.arange(block_size, dtype=np.int32)  # no token is negative
  tokens[:, :2] = ids.view(np.int32).reshape(-1, 2)
  return tokens.reshape(-1)[:num_tokens]


def as_array(tokens: Sequence[int] | np.ndarray) -> np.ndarray:
  """Token ids as `[N]` int32, of a tuple or a list at a third of what NumPy takes."""
  if isinstance(tokens, tuple | list):
    return np.frombuffer(array.array('i', tokens), np.int32)
  return np.asarray(tokens, np.int32)


def split(keys: bytes) -> list[bytes]:
  """Keys one by one."""
  return [keys[start : start + KEY_BYTES] for start in range(0, len(keys), KEY_BYTES)]


def as_pairs(keys: bytes) -> np.ndarray:
  """Keys as `[N, 2]` numbers of 64 bits."""
  return np.frombuffer(keys, '<u8').reshape(-1, 2)
