"""Ceilings are rows of the part that measured them, and are taken from a result that has them."""

import dataclasses
import json
import pathlib

from experiments.device_check import Sizes
from experiments.device_check.bounds import COPY, PRODUCT, READ, START, Ceilings, measure_ceilings
from experiments.device_check.context import Context
from experiments.device_check.figures import Figures, read_lines

TOY = dataclasses.replace(Sizes.toy(), copy_bytes=1 << 12)
ROWS = {COPY: 2.0, READ: 4.0, PRODUCT: 3.0, START: 5.0}


def context(folder: pathlib.Path) -> Context:
  return Context('cpu', TOY, Figures(str(folder / 'lines.jsonl'), marks=False), folder, toy=True)


def test_all_ceilings_are_measured_and_a_sum_may_be_faster_than_a_copy():
  assert all(value > 0 for value in dataclasses.astuple(measure_ceilings(TOY)))
  assert Ceilings.of_rows(ROWS) == Ceilings(2e9, 4e9, 3e12, 5e-6)
  assert Ceilings(2e9, 4e9, 3e12, 5e-6).bytes_per_s == Ceilings(4e9, 2e9, 3e12, 5e-6).bytes_per_s == 4e9


def test_a_part_that_has_to_measure_ceilings_has_rows_of_them(tmp_path):
  found = context(tmp_path).ceilings
  rows = {row['name']: row['value'] for row in read_lines(tmp_path / 'lines.jsonl')['rows']}
  assert rows.keys() == ROWS.keys() and rows[COPY] == found.copy_bytes_per_s / 1e9


def test_those_of_the_result_are_taken_of_the_first_part_that_has_them(tmp_path):
  first, second = ([{'name': name, 'value': value * factor} for name, value in ROWS.items()] for factor in (1, 2))
  parts = [{'part': 'decode', 'rows': [{'name': 'x', 'value': 1}]}, {'part': 'a', 'rows': first}, {'rows': second}]
  (tmp_path / 'result.json').write_text(json.dumps({'parts': parts}), encoding='utf-8')
  assert context(tmp_path).ceilings == Ceilings.of_rows(ROWS)
  assert not (tmp_path / 'lines.jsonl').exists()
