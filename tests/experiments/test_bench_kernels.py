"""Tuning keeps what was fastest by whatever measured it, and a sample of the shapes is spread over all of them."""

import collections
import datetime
import itertools
import json

import jax
import pytest
from absl import flags
from absl.testing import flagsaver
from rich.console import Console

from experiments import bench_kernels, kernel_problems
from pallas_kernels import devices, tuning

CONFIGS = [{'block_n': size, 'depth': 4} for size in (256, 512, 1024)]
PROBLEM = kernel_problems.Problem(
  'a product', 'pallas_kernels.cases:matmul', {'m': 8, 'k': 256, 'n': 1024, 'kind': 'int8'}, candidates=CONFIGS
)


def rows_after(folder, measure, rows=()):
  """The rows of tuning.json once the product is tuned for a v6e."""
  table = folder / 'quantized_matmul' / 'tuning.json'
  table.parent.mkdir(exist_ok=True)
  if rows:
    table.write_text(json.dumps(rows))
  bench_kernels.tune(Console(quiet=True), [PROBLEM], ['v6e'], measure, tables=folder)
  return json.loads(table.read_text()) if table.exists() else []


def take(seconds):
  """A timer of calls by the width of their blocks; those without one do not run."""

  def measure(problem, device):
    assert device == 'v6e'
    width = problem.arguments['config']['block_n']
    return bench_kernels.Figure((seconds[width],), {'microseconds': seconds[width]}) if width in seconds else 'too wide'

  return measure


def test_the_fastest_is_kept_with_its_figures(tmp_path):
  other = {'device': 'v5e', 'problem': PROBLEM.build().facts, 'config': {'block_n': 128}, 'figures': {}}
  old = {**other, 'device': 'v6e'}
  kept, new = rows_after(tmp_path, take({256: 3.0, 512: 2.0}), [old, other])
  assert kept == other
  assert new == {
    'device': 'v6e', 'problem': PROBLEM.build().facts, 'config': {'block_n': 512, 'depth': 4, 'cores': 1},
    'figures': {'microseconds': 2.0},
  }  # fmt: skip


def test_nothing_is_written_where_nothing_runs(tmp_path):
  assert rows_after(tmp_path, take({})) == []


def test_an_estimate_does_not_replace_what_was_timed(tmp_path):
  def estimate(problem, device):
    return bench_kernels.Figure((1.0,), {'percent': 100.0})

  (timed,) = rows_after(tmp_path, take({256: 3.0}))
  assert rows_after(tmp_path, estimate) == [timed]
  (faster,) = rows_after(tmp_path, take({1024: 1.0}))
  assert faster['config']['block_n'] == 1024


def test_a_small_form_is_kept_beside_a_faster_long_one(tmp_path):
  def estimate(problem, device):
    width = problem.arguments['config']['block_n']
    return bench_kernels.Figure((1 / width, 0), {'percent': width}, small=width < 1024)

  assert [row['config']['block_n'] for row in rows_after(tmp_path, estimate)] == [1024, 512]


def test_a_tpu_that_is_here_times_the_candidates(tmp_path, monkeypatch):
  def seconds(case):
    """By the size of the program, which no device is needed for; the narrowest blocks take longest."""
    width = widths.pop(0)
    if width == 1024:
      raise ValueError('it needs too much vector memory')
    return {256: 3e-6, 512: 2e-6}[width]

  def tune(console, problems, names, measure):
    assert [problem.name for problem in problems] == ['matmul int8'] and list(names) == ['v6e']
    measures.append(measure)

  widths, measures = [256, 512, 1024], []
  with monkeypatch.context() as patch:
    patch.setattr(devices, 'current', lambda: devices.by_name('v6e'))
    patch.setattr(bench_kernels, 'tune', tune)
    flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver((bench_kernels._TUNE, True), (bench_kernels._ONLY, '^matmul int8$')):
      bench_kernels.main(['bench_kernels'])
  monkeypatch.setattr(bench_kernels, '_seconds', seconds)
  known = tuning.Row('v6e', PROBLEM.build().facts, {'block_n': 512, 'depth': 4, 'cores': 1}, {'bundles': 7})
  monkeypatch.setattr(tuning, 'load', lambda kernel: (known,))
  (row,) = rows_after(tmp_path, *measures)
  assert row['config']['block_n'] == 512
  figures = row['figures']
  assert figures['microseconds'] == 2.0 and figures['date'] == datetime.date.today().isoformat()
  assert figures['on'] == jax.devices()[0].device_kind and figures['percent'] > 0
  assert figures['bundles'] == 7  # as it was estimated


def test_a_sample_is_the_same_each_time_and_spread_evenly():
  product = list(itertools.product(('v5e', 'v6e'), kernel_problems.shapes()))
  chosen = bench_kernels.sample(product, 42, seed=0)
  assert chosen == bench_kernels.sample(product, 42, seed=0) != bench_kernels.sample(product, 42, seed=1)
  counts = collections.Counter((device, problem.case) for device, problem in chosen)
  assert len(counts) == 8 and set(counts.values()) == {5, 6}
  assert len({(device, problem.name) for device, problem in chosen}) == 42
  assert len(bench_kernels.sample(product, 10**6, seed=0)) == len(product)


def test_each_published_kernel_stands_beside_a_row_of_ours():
  ours = {problem.name for problem in kernel_problems.BARS}
  names = [anchor.name for anchor in kernel_problems.ANCHORS]
  assert {anchor.beside for anchor in kernel_problems.ANCHORS} <= ours
  assert len(set(names)) == len(names) and not ours & set(names)


@pytest.mark.parametrize('anchor', [one for one in kernel_problems.ANCHORS if 'static' in one.arguments])
def test_what_is_timed_is_whole_and_reads_its_lengths(anchor):
  estimated, timed = anchor.build(), anchor.to_time().build()
  assert timed.flops % estimated.flops == 0
  assert timed.flops // estimated.flops == 8 // anchor.arguments.get('kv_heads', 8)
  assert 'static' not in anchor.to_time().arguments
