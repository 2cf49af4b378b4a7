"""The kernels as TPUs would run them: compiled by the real compiler, for every generation, without a TPU."""

import itertools
import json
import pathlib

import pytest

from pallas_kernels import cases, devices, static_cost

pytestmark = pytest.mark.skipif(static_cost.compiler() is None, reason='there is no TPU compiler here; see topology()')

KERNELS = {'prefill': cases.prefill, 'decode': cases.decode, 'copy': cases.copy, 'matmul': cases.matmul_of_heads}
FACTORS = {
  'kernel': tuple(KERNELS),
  'device': ('v5e', 'v5p', 'v6e', 'tpu7x'),
  'heads': ((9, 3), (32, 8), (64, 8), (16, 16)),
  'head_dim': (64, 128, 256),
  'page_size': (16, 32, 64, 128),
  'dtype': ('bfloat16', 'float32'),
  'batch': (1, 7, 64),
  'context': (2048, 131_072),
}


# Any two factors meet with all of their values; the whole product: python -m experiments.bench_kernels --compile.
ROWS = (
  ('prefill', 'v5e', (9, 3), 256, 128, 'float32', 64, 131_072),
  ('prefill', 'v5e', (32, 8), 128, 16, 'bfloat16', 1, 131_072),
  ('prefill', 'v5p', (16, 16), 128, 64, 'float32', 1, 131_072),
  ('prefill', 'v5p', (16, 16), 256, 32, 'bfloat16', 7, 131_072),
  ('prefill', 'v6e', (32, 8), 128, 128, 'float32', 1, 2048),
  ('prefill', 'tpu7x', (64, 8), 64, 64, 'float32', 64, 2048),
  ('decode', 'v5e', (9, 3), 128, 64, 'bfloat16', 7, 131_072),
  ('decode', 'v5p', (32, 8), 64, 16, 'float32', 64, 2048),
  ('decode', 'v6e', (32, 8), 128, 32, 'bfloat16', 64, 131_072),
  ('decode', 'v6e', (16, 16), 128, 128, 'float32', 1, 2048),
  ('decode', 'tpu7x', (64, 8), 256, 128, 'bfloat16', 7, 131_072),
  ('copy', 'v5e', (16, 16), 64, 32, 'bfloat16', 64, 2048),
  ('copy', 'v5p', (64, 8), 128, 128, 'float32', 1, 131_072),
  ('copy', 'v6e', (32, 8), 256, 64, 'float32', 1, 131_072),
  ('copy', 'v6e', (64, 8), 256, 16, 'float32', 7, 2048),
  ('copy', 'tpu7x', (9, 3), 128, 32, 'float32', 1, 2048),
  ('matmul', 'v5e', (64, 8), 256, 32, 'float32', 1, 2048),
  ('matmul', 'v5p', (9, 3), 128, 16, 'float32', 7, 2048),
  ('matmul', 'v6e', (9, 3), 64, 128, 'bfloat16', 64, 131_072),
  ('matmul', 'tpu7x', (32, 8), 64, 64, 'bfloat16', 7, 131_072),
  ('matmul', 'tpu7x', (16, 16), 64, 16, 'bfloat16', 1, 2048),
)


def pairs_of(row):
  """Every two of a row's factors with their values."""
  return set(itertools.combinations(zip(FACTORS, row, strict=True), 2))


def test_the_rows_cover_every_pair_of_values():
  every = set().union(*map(pairs_of, itertools.product(*FACTORS.values())))
  assert set().union(*map(pairs_of, ROWS)) == every
  assert len(ROWS) <= 24, 'the default tests have no time for more'


@pytest.mark.parametrize('row', ROWS, ids=lambda row: '-'.join(map(str, row)).replace(' ', ''))
def test_it_compiles_within_the_memory_of_the_chip(row):
  row = dict(zip(FACTORS, row, strict=True))
  make, device = KERNELS[row.pop('kernel')], devices.by_name(row.pop('device'))
  query_heads, kv_heads = row.pop('heads')
  case = make(query_heads=query_heads, kv_heads=kv_heads, static=False, **row)
  compiled = static_cost.compile_for(device, case)  # fails if the kernel needs more vector memory than there is
  assert 'tpu_custom_call' in compiled.as_text()


BUDGETS = json.loads(pathlib.Path(__file__).with_name('budgets.json').read_text(encoding='utf-8'))


@pytest.mark.parametrize('name', BUDGETS)
def test_no_kernel_grows_by_more_than_three_percent(name):
  """If it is meant to: python -m experiments.bench_kernels --write_budgets."""
  budget = BUDGETS[name]
  cost = static_cost.measure(budget['device'], budget['case'], budget['arguments'])
  for what in ('cycles', 'bundles', 'temp_bytes'):
    assert getattr(cost, what) <= 1.03 * budget[what], f'{name} has more {what} than before'
