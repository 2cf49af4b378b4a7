"""Large problems are compared with plain XLA, the far end of a pool with a small pool: what differs is a failure."""

import pathlib

import jax.numpy as jnp
import pytest

from experiments.device_check import Sizes, large
from experiments.device_check.context import Context
from experiments.device_check.figures import Figures, read_lines
from pallas_kernels.dispatch import Refused


def context(folder: pathlib.Path) -> Context:
  return Context('cpu', Sizes.toy(), Figures(str(folder / 'lines.jsonl')), folder, toy=True)


def test_a_kernel_that_finds_other_pages_at_the_far_end_of_a_pool_fails(tmp_path, monkeypatch):
  attend, elements = large.paged_attention, Sizes.toy().far_elements

  def wraps(q, pages, tables, lengths, implementation):
    if implementation is None and pages.size >= elements:
      tables = tables % 3  # as one that counts in too few bits
      pages = jnp.nan_to_num(pages, nan=1)
    return attend(q, pages, tables, lengths, implementation=implementation)

  monkeypatch.setattr(large, 'paged_attention', wraps)
  large.run(context(tmp_path))
  found = read_lines(tmp_path / 'lines.jsonl')
  (failure,) = found['failures']
  assert failure.startswith('decode automatic, bfloat16, at the end of ')
  names = [row['name'] for row in found['rows']]
  assert len(names) == 6 and sum('beside plain XLA' in name for name in names) == 2


@pytest.mark.parametrize(
  ('said', 'may_refuse', 'failed'),
  [
    (Refused('it cannot run on this'), True, False),
    (Refused('it cannot run on this'), False, True),
    (ValueError('a library cannot run on this either'), True, True),
  ],
)
def test_only_what_is_asked_for_by_name_may_refuse(said, may_refuse, failed, tmp_path):
  def refuse():
    raise said

  one = context(tmp_path)
  large._compare(one, 'a', refuse, refuse, may_refuse)
  found = read_lines(tmp_path / 'lines.jsonl')
  assert bool(found['failures']) == failed and bool(found['notes']) != failed


def test_the_real_pool_has_more_elements_than_32_bits_count():
  assert Sizes.real().far_elements > 1 << 31
