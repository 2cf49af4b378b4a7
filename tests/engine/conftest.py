"""Compiled clusters, built once for all tests of a session: compiling takes seconds, serving takes milliseconds."""

import dataclasses
import functools

import pytest

from pdjax.types import TransferSpec
from tests.engine.cluster import Cluster
from tests.tiny import config

SMALL_PIECES = TransferSpec(granularity='chunk', piece_bytes=4096, checksums=True)


def build(*args, differing=None, transfer=SMALL_PIECES, **kwargs) -> Cluster:
  """A tiny cluster with few sizes of transfer batches; `differing` are fields of each worker that are its own."""
  run = config(*args, **kwargs)
  each = differing or ({},) * len(run.workers)
  workers = [dataclasses.replace(one, **fields) for one, fields in zip(run.workers, each, strict=True)]
  return Cluster(dataclasses.replace(run, workers=workers, transfer=transfer))


@functools.cache
def shared(split: str) -> Cluster:
  """The same, once for all tests of a process."""
  return build(split)


@functools.cache
def shared_colocated() -> Cluster:
  """Two workers that do both, two sequences each, pages of 16 tokens; once for all tests of a process."""
  return build('2C', page_size=16, max_sequences=2)


@pytest.fixture(scope='session')
def two_and_two() -> Cluster:
  """Two prefill workers and two decode workers of one device each, pages of 4 tokens."""
  return shared('2P2D')


@pytest.fixture(scope='session')
def one_and_one(two_and_two: Cluster) -> Cluster:
  """One of each."""
  return two_and_two.only('prefill0', 'decode0')


@pytest.fixture(scope='session')
def colocated_pair() -> Cluster:
  """Two workers that do both, two sequences each, pages of 16 tokens."""
  return shared_colocated()


@pytest.fixture(scope='session')
def colocated(colocated_pair: Cluster) -> Cluster:
  """One of them."""
  return colocated_pair.only('both0')
