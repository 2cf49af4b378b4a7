"""Keys of blocks: the same everywhere, and unlike for whatever is unlike."""

import hashlib
import struct
import subprocess
import sys

import numpy as np
import pytest

from pdjax.serving.block_keys import NO_PARENT, BlockHasher, as_pairs, split, stand_ins

TOKENS = [5, 70_000, 2**31 - 1, 0, 9, 8, 7, 6, 1]


def test_a_key_is_a_keyed_hash_of_its_parent_and_its_tokens():
  secret = hashlib.blake2b(b'[4, ["tiny", "float32"], "ann"]', digest_size=32).digest()
  parent, expected = bytes(16), []
  for block in (TOKENS[:4], TOKENS[4:8]):
    parent = hashlib.blake2b(parent + struct.pack('<4i', *block), digest_size=16, key=secret).digest()
    expected.append(parent)
  assert split(BlockHasher(4, ('tiny', 'float32'), 'ann').keys(TOKENS)) == expected  # a block that is not full has none


def test_keys_go_on_behind_a_parent():
  hasher = BlockHasher(2)
  whole = split(hasher.keys(TOKENS))
  assert split(hasher.keys(TOKENS[4:], parent=whole[1])) == whole[2:]
  assert hasher.keys(TOKENS, parent=NO_PARENT) == b''.join(whole)
  assert hasher.keys([]) == hasher.keys([3]) == b''


@pytest.mark.parametrize(
  'tokens', [tuple(TOKENS), np.array(TOKENS), np.array(TOKENS, np.int32)], ids=['tuple', 'int64', 'int32']
)
def test_any_sequence_of_tokens_has_the_same_keys(tokens):
  assert BlockHasher(4).keys(tokens) == BlockHasher(4).keys(TOKENS)


def test_whatever_is_unlike_has_other_keys():
  hashers = [
    BlockHasher(4), BlockHasher(4, ('a',)), BlockHasher(4, ('a', 'b')), BlockHasher(4, ('ab',)),
    BlockHasher(4, (), 'a'), BlockHasher(4, ('a',), 'b'), BlockHasher(4, ('a',), 'b\ud800'),
  ]  # fmt: skip
  keys = [hasher.keys(TOKENS)[:16] for hasher in hashers]
  assert len({*keys}) == len(hashers)
  first = split(BlockHasher(4).keys(TOKENS))
  assert split(BlockHasher(4).keys([4, *TOKENS[1:]]))[1] != first[1]  # the same block behind another
  assert split(BlockHasher(8).keys(TOKENS))[0] not in first


def test_another_process_has_the_same_keys():
  code = "from pdjax.serving.block_keys import BlockHasher; print(BlockHasher(4, ('m',), 'é').keys(range(9)).hex())"
  told = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True, env={'PYTHONHASHSEED': '7'}
  )
  assert told.stdout.strip() == BlockHasher(4, ('m',), 'é').keys(range(9)).hex()
  assert told.stdout.strip() == '81a6f19d00f9a3ab5c7a264297daab4c46535ff3a6be6cf276d8b259ced33db9'


def test_keys_as_pairs_of_numbers():
  assert as_pairs(bytes(range(32))).tolist() == [
    list(struct.unpack('<2Q', bytes(range(16)))),
    list(struct.unpack('<2Q', bytes(range(16, 32)))),
  ]


def test_stand_ins_are_equal_up_to_the_first_block_that_is_unlike():
  hasher = BlockHasher(4)
  one = split(hasher.keys(stand_ins([7, 2**64 - 1, 9], 8, 24)))
  other = split(hasher.keys(stand_ins([7, 2**64 - 1, 8, 9], 8, 27)))
  assert len(one) == 6 and len(other) == 6 and one[:4] == other[:4]
  assert not {*one[4:]} & {*other}
  assert len({*one, *other}) == 8  # no block stands for another
  assert stand_ins([1, 2**63 + 5], 2, 4).tolist() == [1, 0, 5, -(2**31)] and stand_ins([3], 16, 5).shape == (5,)
