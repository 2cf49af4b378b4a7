"""Reports of logs written by hand, figure by figure."""

import dataclasses
import io
import json
import math

import pytest
from rich.console import Console

import pdjax
from pdjax.metrics import table
from pdjax.metrics.report import Report
from pdjax.metrics.stats import Stats
from pdjax.types.request import SLO, SamplingParams
from pdjax.types.worker import Role, WorkerSpec
from tests import tiny

WORKERS = (WorkerSpec('p', Role.PREFILL), WorkerSpec('d', Role.DECODE))

VLLM_KEYS = {
  'date', 'backend', 'model_id', 'tokenizer_id', 'num_prompts', 'request_rate', 'burstiness', 'max_concurrency',
  'duration', 'completed', 'failed', 'total_input_tokens', 'total_output_tokens', 'request_throughput',
  'request_goodput', 'output_throughput', 'total_token_throughput', 'max_output_tokens_per_s',
  'max_concurrent_requests', 'input_lens', 'output_lens', 'ttfts', 'itls', 'start_times', 'generated_texts', 'errors',
} | {
  f'{figure}_{latency}_ms'
  for figure in ('mean', 'median', 'std', 'p50', 'p90', 'p99')
  for latency in ('ttft', 'tpot', 'itl', 'e2el')
}  # fmt: skip


def _strict(text):
  def refuse(word):
    raise AssertionError(f'{word} is not JSON')

  return json.loads(text, parse_constant=refuse)


def _printed(report):
  console = Console(width=100, record=True, file=io.StringIO())
  table.print_report(report, console)
  return console.export_text()


def test_every_figure_of_one_request(disaggregated, stamps):
  report = Report.from_events(disaggregated(stamps), workers=WORKERS, model_id='tiny', backend='simulator')
  figures = report.to_json()
  assert figures.keys() >= VLLM_KEYS
  assert figures['duration'] == 1.8125
  assert (figures['num_prompts'], figures['completed'], figures['failed']) == (1, 1, 0)
  assert (figures['total_input_tokens'], figures['total_output_tokens']) == (4, 3)
  assert figures['request_throughput'] == 1 / 1.8125
  assert figures['output_throughput'] == 3 / 1.8125
  assert figures['total_token_throughput'] == 7 / 1.8125
  assert figures['mean_ttft_ms'] == figures['median_ttft_ms'] == figures['p99_ttft_ms'] == 812.5
  assert (figures['mean_tpot_ms'], figures['mean_itl_ms'], figures['mean_e2el_ms']) == (500, 500, 1812.5)
  assert figures['std_itl_ms'] == 250
  assert figures['mean_handoff_ms'] == 750
  assert figures['account'] == {
    'queue': 250, 'prefill': 562.5, 'wait': 62.5, 'wire': 125, 'admit': 250, 'step': 312.5,
    'ttft_closes': 0, 'handoff_closes': 0,
  }  # fmt: skip
  assert (figures['wire_bytes'], figures['num_transfers'], figures['wasted_tokens']) == (4096, 1, 2)
  assert figures['mean_host_lag_ms'] == pytest.approx(1e3 * (0.0625 + 0 + 0.0625 + 0) / 4)
  assert figures['finish_reasons'] == {'length': 1}
  assert figures['request_goodput'] is None and figures['goodput_share'] is None
  assert (figures['input_lens'], figures['output_lens'], figures['errors']) == ([4], [3], [''])
  assert (figures['ttfts'], figures['itls'], figures['generated_texts']) == ([0.8125], [[0.75, 0.25]], [''])


def _two_requests(log, slo=None):
  """`a` gets its tokens at 1 and 2 s, `b` only one, at 3 s; `c` is rejected and `d` never ends."""
  log.turn(0.0)
  log.arrive('a')
  log.arrive('b', slo=slo)
  log.arrive('c')
  log.finish('c', 'rejected', 'too long')
  log.arrive('d')
  step = log.step('w', chunks=[('a', 0, 4)])
  log.turn(1.0)
  log.done(step, 0.0, 1.0, {'a': 1})
  step = log.step('w', chunks=[('b', 0, 2)], decodes=['a'])
  log.turn(2.0)
  log.done(step, 1.0, 2.0, {'a': 1})
  log.finish('a')
  step = log.step('w', chunks=[('b', 2, 2)])
  log.turn(4.0)
  log.done(step, 2.0, 4.0, {'b': 1})
  log.finish('b', 'stop')
  return log.events


def test_only_completed_requests_have_latencies(log):
  report = Report.from_events(_two_requests(log), workers=[WorkerSpec('w')])
  assert (report.num_prompts, report.completed, report.failed) == (4, 2, 2)
  assert report.finish_reasons == {'length': 1, 'stop': 1, 'rejected': 1, 'unfinished': 1}
  assert report.ttft == Stats.of_seconds([1.0, 4.0])
  assert report.handoff == report.tpot == Stats.of_seconds([1.0])
  assert report.account.queue_ms == 500 and report.account.prefill_ms == 2000
  figures = report.to_json()
  assert figures['errors'] == ['', '', 'too long', 'unfinished']
  assert figures['ttfts'] == [1.0, 4.0, 0.0, 0.0] and figures['output_lens'] == [2, 1, 0, 0]
  assert any('rejected 1, unfinished 1' in note for note in report.notes)


def test_goodput_counts_requests_within_every_limit(log):
  events = _two_requests(log)
  workers = [WorkerSpec('w')]
  report = Report.from_events(events, workers=workers, slo=SLO(ttft_ms=1000, tpot_ms=1000))
  assert (report.request_goodput, report.goodput_share) == (1 / 4, 1 / 4)
  report = Report.from_events(events, workers=workers, slo=SLO(ttft_ms=4000, tpot_ms=999))
  assert report.request_goodput == 1 / 4  # b's only token leaves no TPOT to miss
  report = Report.from_events(events, workers=workers, slo=SLO(e2el_ms=5000))
  assert (report.request_goodput, report.goodput_share) == (2 / 4, 2 / 4)


def test_a_requests_own_limits_replace_those_of_the_run(log):
  events = _two_requests(log, slo=SLO(ttft_ms=5000))
  workers = [WorkerSpec('w')]
  assert Report.from_events(events, workers=workers, slo=SLO(ttft_ms=1)).request_goodput == 1 / 4
  assert Report.from_events(events, workers=workers).request_goodput == 2 / 4  # a has no limits to miss


def test_peaks_are_counted_in_whole_seconds(log):
  report = Report.from_events(_two_requests(log), workers=[WorkerSpec('w')])
  assert (report.max_output_tokens_per_s, report.max_concurrent_requests) == (1, 2)


def test_an_empty_run_has_a_report():
  report = Report.from_events([], workers=WORKERS, slo=SLO(ttft_ms=1))
  figures = _strict(json.dumps(report.to_json(), allow_nan=False))
  assert figures['num_prompts'] == figures['duration'] == 0
  assert figures['request_throughput'] is figures['mean_ttft_ms'] is figures['account']['queue'] is None
  assert figures['utilisation']['p']['busy'] is None
  assert '0 of 0 requests' in str(report) and 'TTFT' in _printed(report)


def test_the_file_is_finite_json(disaggregated, stamps, tmp_path):
  report = Report.from_events(
    disaggregated(stamps),
    workers=WORKERS,
    config={'limit': math.nan, 'rate': math.inf, 'role': Role.BOTH, 'slo': SLO(), 1: (1, 2)},
    environment={'versions': {'numpy': '2'}},
    generated_texts={'r': 'hello'},
    seed=0,
  )
  assert report.save(tmp_path / 'run') == tmp_path / 'run' / 'report.json'
  figures = _strict((tmp_path / 'run' / 'report.json').read_text())
  assert figures == report.to_json()
  assert figures['request_rate'] == 'Infinity'
  assert (
    figures['config']['limit'] == 'NaN' and figures['config']['role'] == 'both' and figures['config']['1'] == [1, 2]
  )
  assert figures['generated_texts'] == ['hello'] and figures['seed'] == 0
  assert report.save(tmp_path / 'other.json') == tmp_path / 'other.json'


def test_the_table_fits_a_terminal_and_shows_the_account(disaggregated, stamps):
  report = Report.from_events(
    disaggregated(stamps), workers=WORKERS, slo=SLO(ttft_ms=1000), model_id='tiny', backend='engine', calibrated=False,
    warmup_s=3.0,
  )  # fmt: skip
  text = _printed(report)
  assert all(len(line.rstrip()) <= 100 for line in text.splitlines())
  assert 'TTFT 812.5 = queue 250.0 + prefill 562.5 ms' in text
  assert 'hand-off 750.0 = wait 62.5 + wire 125.0 + admit 250.0 + step 312.5 ms' in text
  assert '4.1 kB' in text and 'Uncalibrated' in text
  assert report.ttft_account() in str(report)


def test_a_colocated_run_says_so(log):
  report = Report.from_events(_two_requests(log), workers=[WorkerSpec('w')])
  assert report.handoff_account().endswith('(colocated: no pages move)')


def test_a_disaggregated_run_whose_requests_all_failed_is_not_called_colocated(log):
  log.turn(0.0)
  for name in 'abcde':
    log.arrive(name)
    log.finish(name, 'error', f'request {name} needs 400 pages {"." * 300}' if name < 'e' else 'request d needs none')
  report = Report.from_events(log.events, workers=WORKERS)
  assert 'colocated' not in report.handoff_account()
  assert report.notes[0] == 'No request completed (error 5).'
  assert [note[:17] for note in report.notes[1:]] == [
    'Error: request a ',
    'Error: request b ',
    'Error: request c ',
    'There were 2 othe',
  ]
  assert all(len(note) < 260 for note in report.notes)


def _streams(log, *streams):
  """Requests as their users see them: (name, arrival, pieces as (second, tokens), how it ended)."""
  for name, arrival_s, _, _, *fields in streams:
    log.turn(arrival_s)
    log.arrive(name, arrival_s=arrival_s, **dict(*fields))
  for time_s in sorted({time_s for _, _, pieces, *_ in streams for time_s, _ in pieces}):
    orders = []
    for name, _, pieces, *_ in streams:
      orders += [(log.step('w', decodes=[name]), name, count) for at_s, count in pieces if at_s == time_s]
    log.turn(time_s)
    for order, name, count in orders:
      log.done(order, time_s, time_s, {name: count})
  for name, _, _, reason, *_ in streams:
    if reason is not None:
      log.finish(name, reason, 'lost' if reason == 'error' else None)
  return log.events


# Right values by the formulas of vLLM 0.33.0 (vllm/benchmarks/serve.py, lib/endpoint_request_func.py): an ITL is the
# gap between two chunks, with or without text; TPOT is the latency after the TTFT over the tokens but one.
FOURS = [(1.0, 1), *((1.0 + 0.04 * piece, 4) for piece in range(1, 6))]
AS_VLLM = {
  'a first token, then five pieces of four': (
    [('r', 0.0, FOURS, 'length')],
    {'mean_itl_ms': 40, 'median_itl_ms': 40, 'std_itl_ms': 0, 'p99_itl_ms': 40, 'mean_tpot_ms': 10,
     'max_output_tokens_per_s': 6, 'total_output_tokens': 21, 'itls': [[0.04] * 5]},
  ),
  'one token by one': (
    [('r', 0.0, [(0.5, 1), (0.75, 1), (1.5, 1)], 'length')],
    {'mean_itl_ms': 500, 'std_itl_ms': 250, 'mean_tpot_ms': 500, 'max_output_tokens_per_s': 2, 'itls': [[0.25, 0.75]]},
  ),
  'a first piece of several tokens': (
    [('r', 0.25, [(1.0, 3), (1.5, 1)], 'stop')],
    {'mean_ttft_ms': 750, 'mean_itl_ms': 500, 'mean_tpot_ms': 500 / 3, 'max_output_tokens_per_s': 1, 'itls': [[0.5]]},
  ),
  'the whole answer in one piece has a TPOT of 0 and no ITL': (
    [('r', 0.0, [(2.0, 5)], 'stop')],
    {'mean_itl_ms': None, 'mean_tpot_ms': 0, 'mean_e2el_ms': 2000, 'max_output_tokens_per_s': 1, 'itls': [[]]},
  ),
  'as many tokens as were guessed right': (
    [('r', 0.0, [(0.5, 1), (1.0, 3), (2.0, 1), (3.0, 4), (3.5, 2)], 'length')],
    {'mean_itl_ms': 750, 'median_itl_ms': 750, 'std_itl_ms': 250, 'mean_tpot_ms': 300, 'p90_itl_ms': 1000,
     'max_output_tokens_per_s': 2, 'itls': [[0.5, 1.0, 1.0, 0.5]]},
  ),
  'an answer of one token counts in no mean of TPOT': (
    [('a', 0.0, [(0.5, 1)], 'stop'), ('b', 0.0, [(0.5, 1), (1.5, 4)], 'length')],
    {'mean_itl_ms': 1000, 'mean_tpot_ms': 250, 'mean_ttft_ms': 500, 'max_output_tokens_per_s': 2, 'itls': [[], [1.0]]},
  ),
  'a request that failed keeps its row and counts in no figure': (
    [('a', 0.0, [(0.5, 1), (1.5, 2)], 'length'), ('b', 0.25, [(0.5, 1), (0.75, 2), (0.875, 2)], 'error')],
    {'completed': 1, 'failed': 1, 'mean_itl_ms': 1000, 'max_output_tokens_per_s': 1, 'max_concurrent_requests': 1,
     'total_input_tokens': 4, 'total_output_tokens': 3, 'output_lens': [3, 0], 'ttfts': [0.5, 0.25],
     'itls': [[1.0], [0.25, 0.125]], 'errors': ['', 'lost'], 'input_lens': [4, 4]},
  ),
  'two steps that one turn learns of are one piece, as chunks that nobody has taken are merged': (
    [('r', 0.0, [(0.5, 1), (1.5, 2), (1.5, 2)], 'length')],
    {'mean_itl_ms': 1000, 'mean_tpot_ms': 250, 'max_output_tokens_per_s': 1, 'itls': [[1.0]]},
  ),
  'peaks are of whole seconds from the first arrival of those that completed': (
    [('a', 0.5, [(1.25, 1), (1.49, 4)], 'length'), ('b', 1.75, [(2.25, 2), (2.375, 2), (2.5, 1)], 'length'),
     ('c', 0.0, [(0.25, 1)], 'cancelled')],
    {'max_output_tokens_per_s': 2, 'max_concurrent_requests': 1, 'start_times': [0.5, 1.75, 0.0]},
  ),
}  # fmt: skip


@pytest.mark.parametrize('streams, expected', AS_VLLM.values(), ids=AS_VLLM)
def test_figures_are_those_of_vllms_benchmark(log, streams, expected):
  figures = Report.from_events(_streams(log, *streams), workers=[WorkerSpec('w')]).to_json()
  for name, value in expected.items():
    if isinstance(value, list) and value and isinstance(value[0], list):
      assert [pytest.approx(row) for row in value] == figures[name], name
    else:
      assert figures[name] == (value if value is None else pytest.approx(value)), name


def test_fused_steps_come_as_pieces():
  config = dataclasses.replace(tiny.config(), policy=pdjax.Disaggregated(decode_steps=4))
  report = pdjax.simulate(config).report
  for request in report.timeline.requests:
    assert request.num_tokens == 6 and len(request.itls_s) == 2  # a first token, then four and one
    assert sum(request.itls_s) == pytest.approx(5 * request.tpot_s)
  assert report.itl.mean_ms == pytest.approx(2.5 * report.tpot.mean_ms)


def test_each_sample_has_a_row_and_their_prompt_counts_once_whichever_completes(log):
  """vLLM counts the prompt of a request once, whatever `n` is."""
  log.turn(0.0)
  log.arrive('r', sampling=SamplingParams(n=3))
  names = ['r', 'r#1', 'r#2']
  for name in names[1:]:
    log.requests[name], log.tokens[name] = log.requests['r'], ()
  for time_s, brings in ((1.0, {'r': 1, 'r#1': 1, 'r#2': 2}), (2.0, {'r#1': 3, 'r#2': 2})):
    order = log.step('w', decodes=brings)
    log.turn(time_s)
    log.done(order, time_s, time_s, brings)
  for name, reason in zip(names, ['cancelled', 'length', 'length'], strict=True):
    log.finish(name, reason)
  figures = Report.from_events(log.events, workers=[WorkerSpec('w')]).to_json()
  assert (figures['num_prompts'], figures['completed'], figures['failed']) == (3, 2, 1)
  assert (figures['total_input_tokens'], figures['total_output_tokens']) == (4, 8)
  assert (figures['input_lens'], figures['output_lens'], figures['itls']) == ([4] * 3, [0, 4, 4], [[], [1.0], [1.0]])


@pytest.mark.parametrize(
  'limits, good',
  [  # by vLLM 0.33.0: seconds against the limit in seconds, the limit itself being kept
    (SLO(ttft_ms=0.57), 1),  # 0.00057 * 1e3 is more than 0.57
    (SLO(ttft_ms=0.5699), 0),
    (SLO(tpot_ms=1e-9), 1),  # one token has no TPOT to miss
    (SLO(ttft_ms=0.57, e2el_ms=0.56), 0),
  ],
)
def test_a_limit_is_kept_by_what_takes_as_long_as_it_says(log, limits, good):
  events = _streams(log, ('r', 0.0, [(0.00057, 1)], 'stop'))
  assert Report.from_events(events, workers=[WorkerSpec('w')], slo=limits).goodput_share == good
