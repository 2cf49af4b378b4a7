"""Dollars and watts are told where every chip in use has them, and nowhere else."""

import dataclasses
import io
import json

import pytest
from rich.console import Console

import pdjax
from pdjax.metrics import print_report, save_html
from pdjax.metrics.bill import Bill, Chips
from pdjax.types import ChipSpec
from tests import tiny

FAST = dataclasses.replace(ChipSpec.h100(), dollars_per_hour=3.0, watts=700)
WIDE = dataclasses.replace(ChipSpec.a100(), dollars_per_hour=1.5, watts=400)
DEVICES = {'prefill0': (0, 1), 'decode0': (2, 3, 4)}


def test_chips_that_workers_share_are_paid_once():
  apart = Chips.of({'prefill0': FAST, 'decode0': WIDE}, DEVICES)
  assert (apart.dollars_per_hour, apart.watts) == (2 * 3.0 + 3 * 1.5, 2 * 700 + 3 * 400)
  assert apart.counts == {'H100': 2, 'A100-80': 3} and apart.label('decode0') == 'decode0 (A100-80)'
  shared = Chips.of({'prefill0': FAST, 'decode0': FAST}, {'prefill0': (0, 1), 'decode0': (1, 0)})
  assert (shared.dollars_per_hour, shared.watts, shared.counts) == (6.0, 1400, {'H100': 2})
  assert shared.label('decode0') == 'decode0'


def test_one_chip_without_a_price_leaves_no_dollars_and_keeps_the_watts():
  half = Chips.of({'prefill0': FAST, 'decode0': dataclasses.replace(WIDE, dollars_per_hour=None)}, DEVICES)
  assert (half.dollars_per_hour, half.watts) == (None, 2600)
  bill = Bill.of(half, 100, 5.0, 10.0)
  assert bill.dollars_per_million_tokens is bill.goodput_per_dollar is None and bill.joules_per_token == 260
  nobody = Chips.of({'prefill0': FAST, 'decode0': None}, DEVICES)
  assert nobody == Chips({'prefill0': 'H100'}) and Bill.of(nobody, 100, 5.0, 10.0).line() == ''


def test_a_bill_is_worked_out_of_hours_tokens_and_requests():
  chips = Chips.of({'w': FAST}, {'w': (0, 1)})
  bill = Bill.of(chips, tokens=50_000, goodput=0.5, seconds=120.0)
  assert bill.dollars_per_million_tokens == pytest.approx(6.0 * 120 / 3600 / 0.05)
  assert bill.goodput_per_dollar == 0.5 * 3600 / 6.0
  assert bill.joules_per_token == 1400 * 120 / 50_000
  assert Bill.of(chips, 0, None, 0.0) == Bill(chips)  # nothing was served, and nothing is divided by it
  free = Chips.of({'w': dataclasses.replace(FAST, dollars_per_hour=0.0)}, {'w': (0,)})
  assert Bill.of(free, 10, 1.0, 1.0).dollars_per_million_tokens == 0 and Bill.of(free, 10, 1.0, 1.0).line()


def _run(tmp_path, **chips):
  (prefill, decode) = tiny.config().workers
  workers = (dataclasses.replace(prefill, chip=chips['prefill']), dataclasses.replace(decode, chip=chips['decode']))
  cost = pdjax.Roofline(ChipSpec.tpu_v5e())
  config = dataclasses.replace(tiny.config(), workers=workers, cost=cost, slo=pdjax.SLO(ttft_ms=1e6))
  report = pdjax.simulate(config).report
  report.save(tmp_path)
  console = Console(file=io.StringIO(), width=100)
  print_report(report, console)
  page = save_html(report, tmp_path).read_text(encoding='utf-8')
  return report, json.loads((tmp_path / 'report.json').read_text()), console.file.getvalue(), page


def test_a_report_tells_the_chip_of_each_worker_and_what_answers_cost(tmp_path):
  report, figures, text, page = _run(tmp_path, prefill=FAST, decode=WIDE)
  assert figures['chips'] == {'prefill0': 'H100', 'decode0': 'A100-80'}
  assert (figures['dollars_per_hour'], figures['watts']) == (4.5, 1100)
  assert figures['dollars_per_million_tokens'] == pytest.approx(
    4.5 * report.duration_s / 3600 / report.total_output_tokens * 1e6
  )
  assert figures['goodput_per_dollar'] == pytest.approx(report.request_goodput * 3600 / 4.5)
  assert figures['joules_per_token'] == pytest.approx(1100 * report.duration_s / report.total_output_tokens)
  for shown in (text, page, str(report)):
    assert '$4.50/h' in shown and '1,100 W' in shown
  for shown in (text, page):
    assert 'prefill0 (H100)' in shown and 'decode0 (A100-80)' in shown
  assert figures['config']['workers'][1]['chip']['dollars_per_hour'] == 1.5


def test_no_dollars_are_told_of_chips_that_come_with_pdjax(tmp_path):
  report, figures, text, page = _run(tmp_path, prefill=FAST, decode=None)
  assert figures['chips'] == {'prefill0': 'H100', 'decode0': 'TPU v5e'}
  for name in ('dollars_per_hour', 'watts', 'dollars_per_million_tokens', 'goodput_per_dollar', 'joules_per_token'):
    assert figures[name] is None
  for shown in (text, str(report)):
    assert '$' not in shown and ' W' not in shown and 'goodput per dollar' not in shown
  assert 'goodput per dollar' not in page and 'energy per token' not in page
