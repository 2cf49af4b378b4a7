"""A worker with few buckets pads every step to one of them, and stays such a worker."""

import dataclasses

import pytest

from experiments.few_buckets import FewBuckets, with_few_buckets
from pdjax.types import colocated_pool


def test_prompts_have_one_bucket_and_batches_those_given():
  (usual,) = colocated_pool(1, max_step_tokens=256, max_sequences=64)
  (few,) = with_few_buckets([usual], (1, 64))
  assert len(usual.token_buckets) > 1 and few.token_buckets == (256,) and few.batch_buckets == (1, 64)
  assert dataclasses.replace(few, num_pages=7).batch_buckets == (1, 64)
  assert with_few_buckets([usual])[0].batch_buckets == usual.batch_buckets


def test_it_is_checked_as_any_worker():
  with pytest.raises(ValueError, match='max_sequences=0'):
    FewBuckets('decode0', max_sequences=0)
