"""Disaggregated against colocated: fair baselines, honest winners, sentences that follow the figures."""

import dataclasses
import io
import json

import numpy as np
import pytest
from rich.console import Console

import pdjax
from pdjax import deployment
from pdjax.comparison import (
  Case,
  Comparison,
  Outcomes,
  System,
  at_rate,
  colocated_systems,
  contests,
  disaggregated_systems,
  print_comparison,
  running,
  with_split,
)
from pdjax.deployment import Deployment
from pdjax.policies import Disaggregated, LongestPrefix
from pdjax.types import HostPlace, PrefixCache
from pdjax.types.model import mesh_shape
from tests.tiny import TINY, config

WORKLOAD = pdjax.Poisson(requests_per_s=40, num_requests=24, prompt=pdjax.Uniform(4, 30), output=pdjax.Uniform(1, 9))


@pytest.fixture(scope='module')
def report():
  return pdjax.simulate(config(workload=WORKLOAD)).report


@pytest.fixture(scope='module')
def over_rates(tmp_path_factory):
  """Two splits and the baseline at two rates, in a folder."""
  folder = tmp_path_factory.mktemp('compare')
  run = dataclasses.replace(config('2P1D', workload=WORKLOAD), slo=pdjax.SLO(ttft_ms=100, tpot_ms=10))
  return pdjax.compare(run, rates=(80, 40), splits=('2P1D', '1p2d'), budgets=(8, 16), workdir=folder), folder


def _case(report, seconds, *, division='1P1D', tokens=8, devices=2, rate=1.0, good=None, tpot_s=None, ids=None) -> Case:
  """A case in which every latency is `seconds`, so that only they decide; NaN is a request that did not complete."""
  seconds = np.asarray(seconds, np.float64)
  tpot_s = seconds / 10 if tpot_s is None else np.asarray(tpot_s, np.float64)
  good = np.isfinite(seconds).astype(np.float64) if good is None else good
  system = System(division, tokens, config(division), division.endswith('C'), devices)
  return Case(
    system, rate, report, Outcomes(ids or tuple(map(str, range(len(seconds)))), seconds, tpot_s, seconds * 2, good)
  )


def _compared(*cases, backend='simulator', shown_rate=1.0) -> Comparison:
  return Comparison(backend, cases, shown_rate, {})


def _pair(report, ours, theirs) -> Comparison:
  return _compared(_case(report, ours), _case(report, theirs, division='2C'))


# ---------------------------------------------------------------------------- a fair baseline


def test_the_baseline_is_every_equal_division_that_the_model_allows():
  run = config('2P1D', prefill_tp=2, decode_tp=2)
  systems, missing = colocated_systems([run], TINY, budgets=(8, 32))
  assert [(system.name, system.devices) for system in systems] == [
    (f'{name}, {budget} tokens', 6) for name in ('1C tp6', '3C tp2', '6C tp1') for budget in (8, 32)
  ]
  assert list(missing) == ['2C tp3'] and 'tp=3' in missing['2C tp3']
  assert all(system.colocated and not system.config.policy.moves_kv for system in systems)


def test_the_baseline_uses_what_is_cached_as_the_config_does():
  policy = Disaggregated(place_prefill=LongestPrefix(), returns_to='host0', min_fetch=7)
  places, cache = (HostPlace('host0', 10**6),), PrefixCache(block_tokens=4)
  run = dataclasses.replace(config('2P1D'), policy=policy, places=places, prefix_cache=cache)
  for system in colocated_systems([run], TINY, budgets=(16,))[0]:
    ours = system.config.policy
    assert (ours.placement, ours.returns_to, ours.min_fetch) == (LongestPrefix(), 'host0', 7)
    assert system.config.places == places
  to_source = dataclasses.replace(run, policy=Disaggregated(returns_to='source'))
  assert {one.config.policy.returns_to for one in colocated_systems([to_source], TINY, budgets=(16,))[0]} == {None}


def test_unlike_chips_are_no_equal_division_and_each_worker_does_both_where_it_is():
  h100, a100 = pdjax.ChipSpec.h100(), pdjax.ChipSpec.a100()
  run = config('1P2D', max_sequences=3)
  unlike = dataclasses.replace(run, workers=tuple(
    dataclasses.replace(worker, chip=h100 if worker.role.prefills else a100) for worker in run.workers
  ))  # fmt: skip
  systems, missing = colocated_systems([unlike], TINY, budgets=(8, 32))
  assert [system.name for system in systems] == [
    '3C as they are, 8 tokens',
    '3C as they are, 32 tokens',
  ] and not missing
  for system in systems:
    assert [worker.chip for worker in system.config.workers] == [h100, a100, a100] and system.devices == 3
    assert {worker.role.value for worker in system.config.workers} == {'both'}
    assert pdjax.simulate(system.config).report.completed == len(run.workload.requests)
  alike = dataclasses.replace(run, workers=tuple(dataclasses.replace(worker, chip=h100) for worker in run.workers))
  found = colocated_systems([alike], TINY, budgets=(8,))[0]
  assert found and {worker.chip for one in found for worker in one.config.workers} == {h100}


def test_divisions_have_the_kv_memory_and_the_slots_of_the_config():
  run = config('2P2D', prefill_tp=1, decode_tp=2, max_sequences=5)

  def kv_bytes(workers):  # each of the devices that share a key/value head holds a copy of it
    return sum(worker.num_pages * worker.tp / mesh_shape(TINY, worker.tp)[0] for worker in workers)

  for system in colocated_systems([run], TINY)[0]:
    workers = system.config.workers
    assert kv_bytes(run.workers) - len(workers) * 3 <= kv_bytes(workers) <= kv_bytes(run.workers)
    assert sum(worker.max_sequences for worker in workers) >= 10
    assert {worker.max_step_tokens for worker in workers} == {run.workers[0].max_step_tokens}


def test_budgets_are_parts_of_the_largest_step_unless_they_are_given():
  systems, _ = colocated_systems([config()], TINY)
  assert sorted({system.config.policy.token_budget for system in systems}) == [2, 4, 8, 16, 32]
  with pytest.raises(ValueError, match='0 tokens of one step'):
    colocated_systems([config()], TINY, budgets=(0,))


@pytest.mark.parametrize(('budgets', 'sizes'), [(None, [2, 4, 8, 11, 16, 32]), ((24, 8), [8, 24])])
def test_both_sides_are_tried_with_the_same_sizes_of_a_step(budgets, sizes):
  run = dataclasses.replace(config('2P1D'), policy=pdjax.Disaggregated(max_prefill_tokens=11))
  ours, theirs = disaggregated_systems(run, budgets), colocated_systems([run], TINY, budgets)[0]
  assert [system.config.policy.max_prefill_tokens for system in ours] == sizes
  assert [system.config.policy.token_budget for system in theirs if system.division == '3C tp1'] == sizes
  assert {system.config.workers for system in ours} == {run.workers}  # so nothing more is compiled


def test_a_policy_without_a_size_of_its_steps_is_tried_as_it_is():
  @dataclasses.dataclass(frozen=True)
  class Plain:
    def decide(self, view):
      return []

  run = dataclasses.replace(config(), policy=Plain())
  assert [(one.name, one.config) for one in disaggregated_systems(run)] == [('1P1D', run)]


def test_the_baseline_is_the_same_whatever_the_order_of_the_splits():
  few = with_split(config(decode_tp=2, num_pages=32), '2P1D')
  many = with_split(config(decode_tp=2, num_pages=48), '2P1D')
  wide = with_split(config(prefill_tp=1, decode_tp=1), '1P3D')
  for runs in ((few, many, wide), (wide, many, few)):
    systems, _ = colocated_systems(runs, TINY, budgets=(8,))
    workers = next(system.config.workers for system in systems if system.division == '4C tp1')
    assert sum(worker.max_sequences for worker in workers) >= 12
    assert sum(worker.num_pages for worker in workers) == 4 * 64


def test_workers_that_share_a_device_share_it_with_the_baseline_too():
  workers = pdjax.prefill_pool(1, devices=(0,), num_pages=64) + pdjax.decode_pool(1, devices=(0,), num_pages=64)
  systems, _ = colocated_systems([dataclasses.replace(config(), workers=workers)], TINY, budgets=(16,))
  assert [system.config.workers[0].devices for system in systems] == [(0,)]
  assert [worker.num_pages for worker in systems[0].config.workers] == [128]


def test_divisions_have_the_bytes_of_unlike_pools_in_the_pages_of_the_one_that_decodes():
  workers = pdjax.prefill_pool(1, num_pages=64) + pdjax.decode_pool(1, num_pages=24, page_size=16, kv_dtype='int8')
  run = dataclasses.replace(config(), workers=workers)
  systems, _ = colocated_systems([run], TINY, [16])
  expected = 64 * 4 * TINY.cached_token_bytes('float32') + 24 * 16 * TINY.cached_token_bytes('int8')
  for system in systems:
    sizes = {(worker.page_size, worker.kv_dtype) for worker in system.config.workers}
    assert sizes == {(16, 'int8')}
    copies = [worker.tp / mesh_shape(TINY, worker.tp)[0] for worker in system.config.workers]
    pages = sum(worker.num_pages * share for worker, share in zip(system.config.workers, copies, strict=True))
    page = 16 * TINY.cached_token_bytes('int8')
    assert expected - len(copies) * page < pages * page <= expected


def test_a_split_is_made_of_workers_like_the_first_of_each_role():
  run = config('1P1D', prefill_tp=1, decode_tp=2)
  split = with_split(run, '2P3D')
  assert split.split == '2P3D'
  assert [worker.tp for worker in split.workers] == [1, 1, 2, 2, 2]
  assert with_split(config('2C'), '1P1D').policy == pdjax.Disaggregated()
  with pytest.raises(ValueError, match="split '2P' is not of the form 2P1D"):
    with_split(run, '2P')
  apart = pdjax.prefill_pool(1, devices=(0,)) + pdjax.decode_pool(1, devices=(1,))
  with pytest.raises(ValueError, match='name different devices'):
    with_split(dataclasses.replace(run, workers=apart), '2P1D')


def test_another_rate_meets_the_same_requests():
  again = at_rate(WORKLOAD, 4)
  assert again == dataclasses.replace(WORKLOAD, requests_per_s=4.0)
  for rate in (0, -1, float('nan'), float('inf')):
    with pytest.raises(ValueError, match=r'rate=.*, expected a positive number of requests per second'):
      at_rate(WORKLOAD, rate)
  with pytest.raises(ValueError, match='requests of a Given workload come at times of their own'):
    at_rate(config().workload, 1)


# ---------------------------------------------------------------------------- who wins


def test_the_faster_side_wins_and_the_sentence_follows_both_ways_round(report):
  rng = np.random.default_rng(1)
  slow = rng.uniform(0.9, 1.1, 100)
  fast = slow * 0.8
  ours, theirs = _pair(report, fast, slow), _pair(report, slow, fast)
  assert {one.winner for one in ours.contests[1.0]['1P1D'] if one.unit} == {'1P1D'}
  assert {one.winner for one in theirs.contests[1.0]['1P1D'] if one.unit} == {'2C'}
  assert 'the best colocated system wins on nothing' in ours.verdict()[0]
  assert '1P1D wins on nothing' in theirs.verdict()[0]
  p50_ms = [float(np.percentile(side, 50)) * 1e3 for side in (fast, slow)]
  figure = f'TTFT p50 ({p50_ms[0]:.1f} against {p50_ms[1]:,.{1 if p50_ms[1] < 999.95 else 0}f} ms)'
  assert figure in ours.verdict()[0] and figure in theirs.verdict()[0]


def test_equal_runs_and_differences_within_chance_have_no_winner(report):
  rng = np.random.default_rng(2)
  once = rng.exponential(1.0, 100)
  assert all(one.winner is None for one in _pair(report, once, once).contests[1.0]['1P1D'])
  assert 'are alike' in _pair(report, once, once).verdict()[0]
  other = rng.permutation(once) * 1.02  # 2 % worse, far less than the requests differ
  assert all(one.winner is None for one in _pair(report, other, once).contests[1.0]['1P1D'])


def test_a_sure_difference_of_less_than_a_hundredth_is_none(report):
  seconds = np.linspace(1, 2, 120)
  assert all(one.winner is None for one in contests(_case(report, seconds), _case(report, seconds * 1.005)))
  assert all(one.winner for one in contests(_case(report, seconds), _case(report, seconds * 1.02)) if one.unit)


def test_more_requests_within_their_limits_win(report):
  good = np.ones(60)
  few = good.copy()
  few[::2] = 0
  ours, theirs = _case(report, good, good=good), _case(report, good, good=few, division='2C')
  assert contests(ours, theirs)[0].winner == '1P1D'
  assert contests(dataclasses.replace(ours, outcomes=theirs.outcomes), theirs)[0].winner is None
  assert ours.merit > theirs.merit


def test_among_equals_in_goodput_the_lowest_mean_latency_is_best(report):
  ours = _case(report, [1, 1, 1]), _case(report, [1, 1, 0.7], tokens=16)
  theirs = _case(report, [1, 1, 0.9], division='2C')
  assert _compared(*ours, theirs).pair(1.0) == (ours[1], theirs)


def test_rates_are_told_by_side(report):
  fast, slow = np.linspace(0.5, 1, 120), np.linspace(1, 2, 120)
  cases = [_case(report, fast, rate=1.0), _case(report, slow, rate=1.0, division='2C')]
  cases += [_case(report, slow, rate=8.0), _case(report, fast, rate=8.0, division='2C')]
  cases += [_case(report, fast, rate=2.0), _case(report, fast, rate=2.0, division='2C')]
  result = _compared(*cases, backend='engine')
  lines = result.verdict()
  told = '1P1D is ahead at 1 req/s; colocated is ahead of 1P1D at 8 req/s.'
  assert f'TTFT p99: {told}' in lines and f'Mean E2E: {told}' in lines
  assert 'At other rates no difference is clear, and at no rate in share completed.' in lines
  assert 'Each system ran once' in lines[-1]
  assert result.standings()[0] == ['req/s', '1', '2', '8']
  assert ['TTFT p99', '1P1D', '–', 'colocated'] in result.standings()
  assert list(result.curves) == ['1P1D', 'colocated']
  assert result.beside().standings == result.standings() and told not in ' '.join(result.beside().verdict)


def test_every_split_is_held_against_the_baseline_and_named(report):
  even, fast, slow = (np.linspace(1, 2, 120) * factor for factor in (1.0, 0.5, 2.0))
  cases = []
  for rate in (1.0, 2.0):
    cases.append(_case(report, fast, rate=rate, tpot_s=slow))  # wins TTFT
    cases.append(_case(report, slow, rate=rate, division='1P2D', tpot_s=fast))  # wins TPOT
    cases.append(_case(report, even, rate=rate, division='2C', tpot_s=even))
  result = _compared(*cases)
  assert 'TTFT p99: 1P1D is ahead at every rate; colocated is ahead of 1P2D at every rate.' in result.verdict()
  assert 'TPOT p50: colocated is ahead of 1P1D at every rate; 1P2D is ahead at every rate.' in result.verdict()
  assert not [line for line in result.verdict() if 'colocation is ahead' in line]
  assert list(_compared(*cases[2::-1]).curves) == ['1P1D', '1P2D', 'colocated']  # the shown one first
  rows = {row[0]: row[1:] for row in result.standings()}
  assert rows['TTFT p99'] == ['1P1D', '1P1D'] and rows['TPOT p99'] == ['1P2D', '1P2D']
  winners = {split: results[2]['winner'] for split, results in result.to_json()['contests']['1'].items()}
  assert winners == {'1P1D': '1P1D', '1P2D': '2C'}


def test_colocated_is_ahead_in_the_table_only_where_it_beats_every_split(report):
  even, slow = np.linspace(1, 2, 120), np.linspace(2, 4, 120)
  cases = [
    _case(report, seconds, rate=rate, division=division)
    for rate in (1.0, 2.0)
    for division, seconds in (('1P1D', even if rate == 1 else slow), ('1P2D', slow), ('2C', even))
  ]
  assert {tuple(row[1:]) for row in _compared(*cases).standings()[2:]} == {('–', 'colocated')}


def test_each_split_meets_the_baseline_on_as_many_devices(report):
  even, fast, faster = (np.linspace(1, 2, 120) * factor for factor in (1.0, 0.5, 0.2))
  cases = [_case(report, even), _case(report, fast, division='2C'), _case(report, fast, division='2C', tokens=16)]
  cases += [_case(report, fast, division='3P3D', devices=6), _case(report, faster, division='6C', devices=6)]
  lines = _compared(*cases).verdict()
  assert lines[0].startswith('At 1 req/s, on the same 6 devices, the best colocated system wins on TTFT p50 (300')
  assert lines[1].startswith('At 1 req/s, on the same 2 devices, the best colocated system wins on TTFT p50 (750')
  assert '; colocated as 6C with steps of up to 8 tokens.' in lines[2]
  assert '; colocated, 2 devices as 2C with steps of up to 8 tokens (of 2 tried);' in lines[2]


def test_the_best_at_an_end_of_what_was_tried_says_so(report):
  fast, slow = np.linspace(0.5, 1, 20), np.linspace(1, 2, 20)

  def verdict(smallest, middle, largest):
    sizes = zip((4, 8, 16), (smallest, middle, largest), strict=True)
    baseline = [_case(report, seconds, division='2C', tokens=tokens) for tokens, seconds in sizes]
    return ' '.join(_compared(_case(report, slow), *baseline).verdict())

  assert 'The smallest size of a step that was tried is the best for colocated at 1 req/s' in verdict(fast, slow, slow)
  assert 'The largest size of a step that was tried is the best for colocated at 1 req/s' in verdict(slow, slow, fast)
  assert 'size of a step that was tried' not in verdict(slow, fast, slow)
  assert 'size of a step that was tried' not in verdict(slow, slow, slow)  # it makes no difference


def _sojourns(rng, arrivals_s):
  """Seconds that requests spend at a server of 80 % load that is busy with each for a random time."""
  waited_s, found = 0.0, []
  for gap_s, service_s in zip(np.diff(arrivals_s, prepend=0.0), rng.exponential(0.8, len(arrivals_s)), strict=True):
    waited_s = max(waited_s - gap_s, 0.0) + service_s
    found.append(waited_s)
  return found


def test_equal_queues_seldom_have_a_winner(report):
  rng = np.random.default_rng(3)
  won = 0
  for _ in range(25):
    arrivals_s = np.cumsum(rng.exponential(1.0, 600))
    ours, theirs = (_case(report, _sojourns(rng, arrivals_s), division=name) for name in ('1P1D', '2C'))
    won += sum(one.winner is not None for one in contests(ours, theirs) if one.figure in ('TTFT p50', 'mean E2E'))
  assert won <= 15  # of 50; drawing single requests announces 36


def test_p99_of_few_requests_is_not_judged(report):
  few, many = (_pair(report, np.linspace(1, 2, count), np.linspace(2, 4, count)) for count in (99, 100))
  judged = [[one.figure for one in result.contests[1.0]['1P1D'] if one.judged] for result in (few, many)]
  assert sorted({*judged[1]} - {*judged[0]}) == ['TPOT p99', 'TTFT p99']
  assert 'p99 (' not in few.verdict()[0] and 'TTFT p99 (' in many.verdict()[0]
  assert 'p99 is not judged below 100 requests' in ' '.join(few.verdict())
  assert 'not judged' not in ' '.join(many.verdict()) and 'drawn in blocks of 10 neighbours' in ' '.join(many.verdict())
  alone = _pair(report, np.linspace(1, 2, 6), np.linspace(2, 4, 6))
  assert '6 requests are too few to tell 1P1D and the best colocated system apart' in alone.verdict()[0]


def test_a_side_that_completed_nothing_has_unknown_latencies(report):
  nothing, seconds = np.full(30, np.nan), np.linspace(1, 2, 30)
  one_sided = _pair(report, nothing, seconds).verdict()[0]
  assert '1P1D completed no request, so its latencies are unknown' in one_sided
  assert 'wins on share completed (100.0% against 0.0%)' in one_sided and 'No clear difference' not in one_sided
  neither = _pair(report, nothing, nothing).verdict()[0]
  assert neither == 'At 1 req/s, on the same 2 devices, neither 1P1D nor the best colocated system completed a request.'


def test_latencies_are_compared_over_what_both_completed(report):
  all_of_them = np.repeat([1.0, 9.0], 60)
  easy_half = np.where(all_of_them < 5, all_of_them * 1.2, np.nan)
  line = _pair(report, easy_half, all_of_them).verdict()[0]
  assert 'mean E2E (2,000 against 2,400 ms)' in line
  assert 'Latencies are those of the 60 requests that both completed.' in line


def test_high_rates_are_written_out(report):
  seconds, rates = np.linspace(1, 2, 120), (5.0, 1234.5, 250_000.0)
  cases = [_case(report, seconds * (1 if rate == 5 else 2), rate=rate) for rate in rates]
  cases += [_case(report, seconds, rate=rate, division='2C') for rate in rates]
  result = _compared(*cases, shown_rate=1234.5)
  assert result.verdict()[0].startswith('At 1,234.5 req/s') and result.standings()[0][1:] == ['5', '1,234.5', '250,000']
  assert 'colocated is ahead of 1P1D at 1,234.5 and 250,000 req/s.' in result.verdict()[1]
  assert result.beside().rows[2][1] == '250,000'


def test_the_printed_comparison_is_not_wrapped_and_says_what_its_rows_are(report):
  console = Console(file=io.StringIO(), width=80)
  result = _pair(report, np.linspace(1, 2, 120), np.linspace(2, 4, 120))
  print_comparison(result, console)
  text = console.file.getvalue()
  assert all(f'• {line}\n' in text for line in result.verdict())
  assert 'The best of each split and of the colocated systems at each rate' in text


# ---------------------------------------------------------------------------- whole comparisons


def test_a_comparison_tries_every_system_at_every_rate(over_rates):
  result, _ = over_rates
  names = {case.system.name for case in result.cases}
  assert names == {f'{division}, {tokens} tokens' for division in ('2P1D', '1P2D', '3C tp1') for tokens in (8, 16)}
  assert list(result.missing) == ['1C tp3']
  assert len(result.cases) == len(names) * 2 and result.rates == (40, 80) and result.shown_rate == 40
  assert all(case.system.devices == 3 for case in result.cases)
  for rate in result.rates:
    ours, theirs = result.pair(rate)
    assert ours.merit == max(case.merit for case in result.cases if case.rate == rate and not case.system.colocated)
    assert theirs.merit == max(case.merit for case in result.cases if case.rate == rate and case.system.colocated)


def test_a_comparison_leaves_a_page_and_figures_for_both(over_rates):
  result, folder = over_rates
  data = json.loads((folder / 'compare.json').read_text())
  assert data['verdict'] == result.verdict() and data['best']['40'] == [case.system.name for case in result.pair(40)]
  assert len(data['cases']) == 12 and data['cases'][0]['p99_ttft_ms'] == result.cases[0].report.ttft.p99_ms
  text = (folder / 'report.html').read_text()
  assert all(
    words in text
    for words in ('Over the rate of requests', 'All that was tried', 'colocated: 3C tp1', 'Not possible: 1C tp3;')
  )
  for place, side in ((folder, 0), (folder / 'colocated', 1)):
    shown = result.pair(40)[side].report
    assert json.loads((place / 'report.json').read_text())['ttfts'] == [r.ttft_s for r in shown.timeline.requests]
    assert {path.name for path in place.iterdir()} >= {'events.jsonl', 'trace.json', 'report.html'}


@pytest.mark.slow
def test_a_comparison_is_drawn_over_its_rates_or_as_latencies_of_two_runs(over_rates):
  def titles(comparison):
    return [part['title'] for part in comparison.chart().to_dict()['concat']]

  comparison, _ = over_rates
  assert titles(comparison)[:2] == ['Goodput', 'Time to first token, p99']
  one = pdjax.compare(config(workload=WORKLOAD), budgets=(8,))
  assert titles(one)[:2] == ['Time to first token', 'Hand-off: first to second token']
  curves = next(iter(one.chart().to_dict()['datasets'].values()))
  assert '1P1D' in curves and one.pair(one.shown_rate)[1].system in curves


def test_a_printed_comparison_is_its_verdict_in_lines_that_fit_a_screen(over_rates):
  comparison, _ = over_rates
  assert ' '.join(str(comparison).split()) == ' '.join(' '.join(comparison.verdict()).split())
  assert max(map(len, str(comparison).splitlines())) <= 110


@pytest.mark.slow
def test_the_engine_compiles_each_cluster_once(monkeypatch):
  deployed = []
  deploy = running.deploy

  def counted(run, *arguments):
    deployed.append(run.split)
    return deploy(run, *arguments)

  monkeypatch.setattr(running, 'deploy', counted)
  workload = dataclasses.replace(WORKLOAD, num_requests=6, requests_per_s=100.0)
  small = dataclasses.replace(TINY, num_layers=1)
  run = config(model=small, workload=workload, max_sequences=1, max_step_tokens=16, max_chunks=1, max_fused_steps=1)
  run = dataclasses.replace(run, workers=tuple(dataclasses.replace(one, devices=(0,)) for one in run.workers))
  result = pdjax.compare(run, backend='engine', rates=(100, 200), budgets=(8, 16))
  assert deployed == ['1P1D', '1C']
  assert len(result.cases) == 8 and all(case.report.completed == 6 for case in result.cases)
  assert all(case.report.backend == 'engine' for case in result.cases)
  first, second = (case.report for case in result.cases[:2])
  assert first.total_output_tokens == second.total_output_tokens
  assert max(second.account.ttft_closes_s, first.account.handoff_closes_s) < 1e-6
  assert 'ran once' in result.verdict()[-1]


def test_cases_that_had_ended_outlive_a_comparison_that_is_stopped(tmp_path):
  said = []

  def say(line):
    said.append(line)
    if len(said) == 3:
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    pdjax.compare(config('2P1D', workload=WORKLOAD), budgets=(8, 16), workdir=tmp_path, say=say)
  rows = [json.loads(line) for line in (tmp_path / 'cases.jsonl').read_text().splitlines()]
  assert [row['system'] for row in rows] == [line.split(' at ')[0] for line in said[:2]]
  assert all(row['completed'] == 24 for row in rows) and not (tmp_path / 'compare.json').exists()


def test_what_a_comparison_cannot_write_is_named_and_takes_no_figure_with_it(tmp_path):
  for name in ('compare.json', 'colocated/report.json', 'colocated/events.jsonl'):
    (tmp_path / name).mkdir(parents=True)
  result = pdjax.compare(config('2P1D', workload=WORKLOAD), budgets=(8,), workdir=tmp_path)
  assert [line.split()[0] for line in result.unwritten] == [
    str(tmp_path / name) for name in ('compare.json', 'colocated/report.json', 'colocated/events.jsonl')
  ]
  assert (tmp_path / 'report.json').is_file() and (tmp_path / 'events.jsonl').is_file() and result.verdict()


def test_a_division_that_does_not_fit_is_left_out_and_a_mistake_in_serving_is_not(monkeypatch):
  run = config('2P1D', workload=WORKLOAD, num_pages='auto')
  build, serve = deployment._build_simulator, Deployment.serve

  def full(run, *arguments):
    if run.split == '3C':
      raise ValueError('memory is full')
    return build(run, *arguments)

  monkeypatch.setattr(deployment, '_build_simulator', full)
  with pytest.raises(ValueError, match=r'no equal division of 3 devices .* 3C tp1: memory is full'):
    pdjax.compare(run, budgets=(8,))
  monkeypatch.undo()

  def broken(self, arrivals):
    if self.config.split == '3C':
      raise ValueError('a mistake')
    return serve(self, arrivals)

  monkeypatch.setattr(Deployment, 'serve', broken)
  with pytest.raises(ValueError, match=r'^a mistake$'):
    pdjax.compare(run, budgets=(8,))


def test_what_cannot_be_compared_says_why():
  with pytest.raises(ValueError, match=r'the config is the colocated baseline itself \(2C\)'):
    pdjax.compare(config('2C', workload=WORKLOAD))
  with pytest.raises(ValueError, match='rates is empty'):
    pdjax.compare(config(workload=WORKLOAD), rates=())
  with pytest.raises(ValueError, match='has no workload'):
    pdjax.compare(dataclasses.replace(config(), workload=None))


def test_only_requests_that_came_to_both_are_contested(report):
  """Of a chat that failed in one run, the turns after it came in the other alone."""
  rng = np.random.default_rng(0)
  seconds = rng.uniform(1, 2, 40)
  ids = [f'chat{i}' for i in range(40)]
  order = rng.permutation(40)
  more = np.concatenate([seconds[order] * 1.5, [0.001] * 9])
  ours = _case(report, seconds, ids=tuple(ids))
  theirs = _case(report, more, division='2C', ids=(*(ids[i] for i in order), *(f'turn{i}' for i in range(9))))
  compared = _compared(ours, theirs)
  won = {one.figure: one for one in compared.contests[1.0]['1P1D']}
  assert won['mean E2E'].winner == '1P1D' and won['mean E2E'].theirs == pytest.approx(1.5 * won['mean E2E'].ours)
  assert 'mean E2E' in compared.verdict()[0]
