"""Transports compile a program for every size of batch that may travel, and no other."""

import jax

from pdjax.kv.transfer import DevicePut
from pdjax.types import TransferSpec
from tests.kv.transfer.pools import Pool
from tests.tiny import TINY


def test_batches_are_no_larger_than_the_smaller_pool():
  source, target = (Pool.random(TINY, jax.devices()[:1], pages, 0) for pages in (64, 15))
  assert set(DevicePut(source, target, TransferSpec()).compile()) == {'1 units', '4 units'}
