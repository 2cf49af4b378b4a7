"""Figures by class and tenant are those of their requests alone, and few whatever there are of them."""

import io
import json

import pytest
from rich.console import Console

import pdjax
from pdjax.metrics import groups, page, table
from pdjax.metrics.counters import counters, prometheus_text
from pdjax.metrics.report import Report
from pdjax.metrics.timeline import read_timeline
from pdjax.types.request import SLO
from pdjax.types.worker import Role, WorkerSpec

WORKERS = (WorkerSpec('w', Role.BOTH),)


@pytest.fixture
def report(log) -> Report:
  """`a` and `b` are chat, of which `b` fails; `c` is code, `d` is nothing. `a` and `c` end at 2 and 4 s, `d` at 4 s."""
  log.turn(0.0)
  log.arrive('a', class_name='chat', tenant='ann', deadline_s=2.0)
  log.arrive('b', class_name='chat', tenant='ann', deadline_s=9.0)
  log.finish('b', 'rejected', 'too long')
  log.arrive('c', class_name='code', tenant='ann', deadline_s=3.5)
  log.arrive('d', tenant='ann')
  step = log.step('w', chunks=[('a', 0, 4), ('c', 0, 4), ('d', 0, 4)])
  log.turn(1.0)
  log.done(step, 0.0, 1.0, {'a': 1, 'c': 1, 'd': 1})
  step = log.step('w', decodes=['a', 'c', 'd'])
  log.turn(2.0)
  log.done(step, 1.0, 2.0, {'a': 1, 'c': 1, 'd': 1})
  log.finish('a')
  step = log.step('w', decodes=['c', 'd'])
  log.turn(4.0)
  log.done(step, 2.0, 4.0, {'c': 1, 'd': 1})
  log.finish('c')
  log.finish('d')
  return Report.from_events(log.events, workers=WORKERS, slo=SLO(ttft_ms=500, tpot_ms=2000))


def test_every_figure_is_of_the_requests_of_a_class(report):
  assert list(report.by_class) == ['chat', 'code', '']
  chat, code, others = report.by_class.values()
  assert (chat.num_prompts, chat.completed, chat.failed, chat.output_tokens) == (2, 1, 1, 2)
  assert (code.num_prompts, code.completed, code.failed, code.output_tokens) == (1, 1, 0, 3)
  assert (others.num_prompts, others.output_tokens) == (1, 3)
  assert (chat.ttft.p50_ms, chat.tpot.mean_ms, chat.e2el.p99_ms) == (1000, 1000, 2000)
  assert (code.ttft.p50_ms, code.tpot.mean_ms, code.e2el.p99_ms) == (1000, 1500, 4000)
  assert chat.output_throughput == 2 / 4 and code.output_throughput == 3 / 4
  assert (chat.goodput_share, chat.request_goodput) == (0, 0)  # 500 ms to the first token are not enough
  assert report.by_tenant.keys() == {'ann'} and report.by_tenant['ann'].num_prompts == 4


def test_a_deadline_is_kept_by_who_ended_well_by_it(report):
  """`a` ends at its deadline to the second, `b` fails in time, `c` is late, and nobody waits for `d`."""
  assert [one.deadline_share for one in report.by_class.values()] == [0.5, 0, None]
  assert report.deadline_share == pytest.approx(1 / 3)


def test_limits_of_a_run_count_by_class(log):
  log.turn(0.0)
  log.arrive('a', class_name='chat', slo=SLO(ttft_ms=5000))
  log.arrive('b', class_name='code', slo=SLO(ttft_ms=10))
  step = log.step('w', chunks=[('a', 0, 4), ('b', 0, 4)])
  log.turn(1.0)
  log.done(step, 0.0, 1.0, {'a': 1, 'b': 1})
  log.finish('a')
  log.finish('b')
  report = Report.from_events(log.events, workers=WORKERS)
  assert [(one.goodput_share, one.request_goodput) for one in report.by_class.values()] == [(1, 1), (0, 0)]


def test_the_file_has_them_and_nothing_where_nobody_has_a_class(report, disaggregated, stamps, tmp_path):
  figures = json.loads(report.save(tmp_path).read_text())
  assert figures['deadline_share'] == pytest.approx(1 / 3)
  chat = figures['by_class']['chat']
  assert (chat['num_prompts'], chat['p99_e2el_ms'], chat['mean_ttft_ms'], chat['deadline_share']) == (
    2,
    2000,
    1000,
    0.5,
  )
  assert figures['by_class'].keys() == {'chat', 'code', ''} and figures['by_tenant'].keys() == {'ann'}
  plain = Report.from_events(disaggregated(stamps), workers=WORKERS).to_json()
  assert (plain['by_class'], plain['by_tenant'], plain['deadline_share']) == ({}, {}, None)


def _printed(report: Report, width: int = 100) -> str:
  console = Console(width=width, file=io.StringIO())
  table.print_report(report, console)
  return console.file.getvalue()


def test_the_terminal_and_the_page_show_several_classes_and_no_single_tenant(report, few_requests):
  text = _printed(report, width=90)
  assert 'class (ms)' in text and 'tenant' not in text and '…' not in text
  (line,) = [line for line in text.splitlines() if line.startswith(' chat')]
  assert line.split() == ['chat', '2', '1', '1,000/1,000', '1,000/1,000', '0.50', '0.0%', '50.0%']
  assert 'within deadline' in text and 'no class' in text
  html = page.render_html(report)
  assert '<h2>By class and tenant</h2>' in html and '<th scope="row">code</th>' in html
  beside = page.render_html(report, page.Beside(report, name='colocated'))
  assert '<th scope="row">code, colocated</th>' in beside
  assert 'class (ms)' not in _printed(few_requests) and 'By class' not in page.render_html(few_requests)


def test_counters_have_a_label_for_each_class(report):
  found = counters(report.timeline)
  assert found['pdjax:class_requests_total{class_name="chat"}'] == 2
  assert found['pdjax:class_completed_total{class_name="chat"}'] == 1
  assert found['pdjax:class_output_tokens_total{class_name="code"}'] == 3
  assert found['pdjax:class_requests_total{class_name=""}'] == 1
  assert found['pdjax:tenant_requests_total{tenant="ann"}'] == 4


def test_a_label_is_escaped(log):
  log.arrive('a', class_name='say "hi"\n\\')
  lines = prometheus_text(read_timeline(log.events)).splitlines()
  assert 'pdjax:class_requests_total{class_name="say \\"hi\\"\\n\\\\"} 1' in lines


def test_samples_are_of_the_class_of_their_request_and_a_timeline_tells_it(log):
  log.arrive('a', class_name='chat', tenant='ann', deadline_s=1.0, sampling=pdjax.SamplingParams(n=3))
  log.arrive('b')
  report = Report.from_events(log.events, workers=WORKERS)
  assert {name: one.num_prompts for name, one in report.by_class.items()} == {'chat': 3, '': 1}
  told = [(one.class_name, one.tenant, one.deadline_s) for one in report.timeline.requests]
  assert told == [('chat', 'ann', 1.0)] * 3 + [(None, None, None)]


def test_of_very_many_tenants_those_with_the_most_requests_have_figures(log):
  for number in range(groups.MOST_GROUPS + 20):
    for count in range(2 if number >= 20 else 1):
      log.arrive(f'{number}-{count}', tenant=f't{number}')
  report = Report.from_events(log.events, workers=WORKERS)
  assert list(report.by_tenant) == [f't{number}' for number in range(20, groups.MOST_GROUPS + 20)]
  assert f'Of {groups.MOST_GROUPS + 20:,} tenants the {groups.MOST_GROUPS} with the most requests' in ''.join(
    report.notes
  )
