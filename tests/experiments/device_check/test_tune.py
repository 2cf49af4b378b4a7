"""Rows that tuning writes are rows of a kernel's table, and of a problem the fastest is the one that is taken."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest

from experiments.device_check import Sizes
from experiments.device_check.bounds import Ceilings
from experiments.device_check.context import Context
from experiments.device_check.figures import Figures, read_lines
from experiments.device_check.kernels import Pool
from experiments.device_check.tune import Choice, _block_tokens, _blocks, _packed, rows_of
from pallas_kernels import devices
from pallas_kernels.prefill_attention.cudnn import Config
from pallas_kernels.tuning import Row, nearest
from pdjax.types.json_text import json_text

SMALL = {'dtype': 'bfloat16', 'context': 1024, 'batch': 1}
LARGE = {'dtype': 'bfloat16', 'context': 8192, 'batch': 1}


def choice(problem: dict, implementation: str = 'xla', **config) -> Choice:
  return Choice('paged_attention', str(problem), problem, config, implementation)


def test_the_fastest_choice_of_a_problem_is_the_one_that_is_taken():
  measured = [
    (choice(SMALL, block_tokens=512, whole=0), 9.0), (choice(LARGE, block_tokens=512, whole=2048), 70.0),
    (choice(SMALL, block_tokens=1024, whole=2048), 7.0), (choice(LARGE, block_tokens=4096, whole=2048), 50.0),
    (choice(SMALL, block_tokens=256, whole=0), 8.0), (choice(LARGE, block_tokens=1024, whole=2048), 60.0),
    (choice(SMALL, 'cudnn', apart=True), 3.0),
  ]  # fmt: skip
  (kernel,) = written = rows_of(measured, 'an H100', '2026-11-28')
  assert kernel == 'paged_attention'
  rows = tuple(Row(**one) for one in json.loads(json_text([dataclasses.asdict(row) for row in written[kernel]])))
  assert len(rows) == len(measured) and all(row.figures['microseconds'] and row.figures['date'] for row in rows)
  xla = tuple(row for row in rows if row.implementation == 'xla')
  for problem, block_tokens in ((SMALL, 1024), (LARGE, 4096)):
    row, exact = nearest(xla, 'an H100', problem)
    assert exact and row.config == {'block_tokens': block_tokens, 'whole': 2048}
  assert nearest(xla, 'an A100', SMALL) is None


def test_parameters_say_up_to_which_table_there_is_one_block():
  platform = {'blocks': (256, 1024), 'whole': 2048}
  wide = _blocks([(128, 512), (256, 4096)], 4096, platform)
  assert wide == [{'blocks': [128, 512], 'whole': 2048}, {'blocks': [256, 4096], 'whole': 2048}]
  short = _blocks([(128, 512), (256, 512), (256, 4096)], 2048, platform)
  assert short == [
    {'blocks': [128, 512], 'whole': 0}, {'blocks': [256, 512], 'whole': 0},
    {'blocks': [128, 1024], 'whole': 2048}, {'blocks': [256, 1024], 'whole': 2048},
  ]  # fmt: skip
  platform = {'block_tokens': 1024, 'whole': 2048}
  assert _block_tokens([512, 2048], 8192, platform) == [
    {'block_tokens': 512, 'whole': 2048}, {'block_tokens': 2048, 'whole': 2048},
  ]  # fmt: skip
  assert _block_tokens([512, 2048], 2048, platform) == [
    {'block_tokens': 512, 'whole': 0}, {'block_tokens': 1024, 'whole': 2048},
  ]  # fmt: skip
  assert _block_tokens([16], 64, {}) == [{'block_tokens': 16, 'whole': 0}]


@pytest.mark.parametrize(
  ('device', 'dtype', 'timed'), [('h100', 'bfloat16', 3), ('h100', 'float32', 0), ('t4', 'float16', 0)]
)
def test_tiles_of_cudnn_are_timed_where_it_can_run_and_else_the_reason_is_told(
  device, dtype, timed, tmp_path, monkeypatch
):
  monkeypatch.setattr(devices, 'current', lambda: devices.by_name(device))
  context = Context('gpu', Sizes.real(), Figures(str(tmp_path / 'lines.jsonl')), pathlib.Path(tmp_path))
  context.__dict__['ceilings'] = Ceilings(3e12, 3e12, 8e14, 8e-6)
  pool = Pool(jax.ShapeDtypeStruct((9, 2, 8, 16, 128), dtype), 16, np.arange(9))
  (chunks,) = context.sizes.tuned_packed
  choices = [case.about for case in _packed(context, pool, chunks)]
  assert len(choices) == timed and bool(read_lines(tmp_path / 'lines.jsonl')['notes']) == (not timed)
  rows = [Config(**choice.config).tile_rows for choice in choices]
  assert rows == list(context.sizes.tuned_tile_rows)[:timed]
  assert all(choice.implementation == 'cudnn' and choice.problem['tokens'] == 2048 for choice in choices)
