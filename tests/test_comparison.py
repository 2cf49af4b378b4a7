"""Disaggregated against colocated: fair baselines, honest winners, sentences that follow the figures."""

import dataclasses
import json

import numpy as np
import pytest

import pdjax
from pdjax import comparison as compared
from pdjax import launch
from pdjax.comparison import Case, Comparison, Outcomes, at_rate, colocated_systems, contests, with_split
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


def _case(report, seconds, *, colocated=False, rate=1.0, good=None) -> Case:
  """A case in which every latency is `seconds`, so that only they decide."""
  seconds = np.asarray(seconds, np.float64)
  outcomes = Outcomes(seconds, seconds / 10, seconds * 2, np.ones(len(seconds)) if good is None else good)
  return Case('colocated' if colocated else '1P1D', colocated, 2, rate, report, outcomes)


def _pair(report, ours, theirs) -> Comparison:
  return Comparison('simulator', (_case(report, ours), _case(report, theirs, colocated=True)), 1.0, {})


# ---------------------------------------------------------------------------- a fair baseline


def test_the_baseline_is_every_equal_division_that_the_model_allows():
  run = config('2P1D', prefill_tp=2, decode_tp=2)
  systems, missing = colocated_systems(run, TINY, budgets=(8, 32))
  assert [(system.name, system.devices) for system in systems] == [
    (f'{name}, {budget} tokens', 6) for name in ('1C tp6', '3C tp2', '6C tp1') for budget in (8, 32)
  ]
  assert list(missing) == ['2C tp3'] and 'tp=3' in missing['2C tp3']
  assert all(system.colocated and not system.config.policy.moves_kv for system in systems)


def test_divisions_have_the_kv_memory_and_the_slots_of_the_config():
  run = config('2P2D', prefill_tp=1, decode_tp=2, max_sequences=5)

  def kv_bytes(workers):  # each of the devices that share a key/value head holds a copy of it
    return sum(worker.num_pages * worker.tp / mesh_shape(TINY, worker.tp)[0] for worker in workers)

  for system in colocated_systems(run, TINY)[0]:
    workers = system.config.workers
    assert kv_bytes(run.workers) - len(workers) * 3 <= kv_bytes(workers) <= kv_bytes(run.workers)
    assert sum(worker.max_sequences for worker in workers) >= 10
    assert {worker.max_step_tokens for worker in workers} == {run.workers[0].max_step_tokens}


def test_budgets_are_parts_of_the_largest_pass_unless_they_are_given():
  systems, _ = colocated_systems(config(), TINY)
  assert sorted({system.config.policy.token_budget for system in systems}) == [4, 8, 16, 32]
  with pytest.raises(ValueError, match='token budget 0'):
    colocated_systems(config(), TINY, budgets=(0,))


def test_workers_that_share_a_device_share_it_with_the_baseline_too():
  workers = pdjax.prefill_pool(1, devices=(0,), num_pages=64) + pdjax.decode_pool(1, devices=(0,), num_pages=64)
  systems, _ = colocated_systems(dataclasses.replace(config(), workers=workers), TINY, budgets=(16,))
  assert [system.config.workers[0].devices for system in systems] == [(0,)]
  assert [worker.num_pages for worker in systems[0].config.workers] == [128]


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
    with pytest.raises(ValueError, match='not a positive number of requests per second'):
      at_rate(WORKLOAD, rate)
  with pytest.raises(ValueError, match='requests of a Given workload come at times of their own'):
    at_rate(config().workload, 1)


# ---------------------------------------------------------------------------- who wins


def test_the_faster_side_wins_and_the_sentence_follows_both_ways_round(report):
  rng = np.random.default_rng(1)
  slow = rng.uniform(0.9, 1.1, 100)
  fast = slow * 0.8
  ours, theirs = _pair(report, fast, slow), _pair(report, slow, fast)
  assert {one.winner for one in ours.contests[1.0] if one.unit} == {'1P1D'}
  assert {one.winner for one in theirs.contests[1.0] if one.unit} == {'colocated'}
  assert 'the best colocated system wins on nothing' in ours.verdict()[0]
  assert '1P1D wins on nothing' in theirs.verdict()[0]
  p50_ms = [float(np.percentile(side, 50)) * 1e3 for side in (fast, slow)]
  figure = f'TTFT p50 ({p50_ms[0]:.1f} against {p50_ms[1]:,.{1 if p50_ms[1] < 999.95 else 0}f} ms)'
  assert figure in ours.verdict()[0] and figure in theirs.verdict()[0]


def test_equal_runs_and_differences_within_chance_have_no_winner(report):
  rng = np.random.default_rng(2)
  once = rng.exponential(1.0, 100)
  assert all(one.winner is None for one in _pair(report, once, once).contests[1.0])
  assert 'are alike' in _pair(report, once, once).verdict()[0]
  other = rng.permutation(once) * 1.02  # 2 % worse, far less than the requests differ
  assert all(one.winner is None for one in _pair(report, other, once).contests[1.0])


def test_a_sure_difference_of_less_than_a_hundredth_is_none(report):
  seconds = np.linspace(1, 2, 50)
  assert all(one.winner is None for one in contests(_case(report, seconds), _case(report, seconds * 1.005)))
  assert all(one.winner for one in contests(_case(report, seconds), _case(report, seconds * 1.02)) if one.unit)


def test_more_requests_within_their_limits_win(report):
  good = np.ones(60)
  few = good.copy()
  few[:30] = 0
  ours, theirs = _case(report, good, good=good), _case(report, good, good=few, colocated=True)
  assert contests(ours, theirs)[0].winner == '1P1D'
  assert contests(dataclasses.replace(ours, outcomes=theirs.outcomes), theirs)[0].winner is None
  assert ours.merit > theirs.merit


def test_among_equals_in_goodput_the_lowest_mean_latency_is_best(report):
  cases = (_case(report, [1, 1, 1]), _case(report, [1, 1, 0.7]), _case(report, [1, 1, 0.9], colocated=True))
  assert Comparison('simulator', cases, 1.0, {}).pair(1.0) == (cases[1], cases[2])


def test_rates_are_told_by_side(report):
  fast, slow = np.linspace(0.5, 1, 40), np.linspace(1, 2, 40)
  cases = [_case(report, fast, rate=1.0), _case(report, slow, rate=1.0, colocated=True)]
  cases += [_case(report, slow, rate=8.0), _case(report, fast, rate=8.0, colocated=True)]
  cases += [_case(report, fast, rate=2.0), _case(report, fast, rate=2.0, colocated=True)]
  lines = Comparison('engine', tuple(cases), 1.0, {}).verdict()
  told = 'disaggregation is ahead at 1; colocation is ahead at 8; no clear difference at 2 req/s.'
  assert f'TTFT p99: {told}' in lines and f'Mean E2E: {told}' in lines
  assert 'No clear difference at any rate in share completed.' in lines
  assert 'each system ran once' in lines[-1]


# ---------------------------------------------------------------------------- whole comparisons


def test_a_comparison_tries_every_system_at_every_rate(over_rates):
  result, _ = over_rates
  names = {case.system for case in result.cases}
  assert names == {'2P1D', '1P2D', '3C tp1, 8 tokens', '3C tp1, 16 tokens'}
  assert list(result.missing) == ['1C tp3']
  assert len(result.cases) == len(names) * 2 and result.rates == (40, 80) and result.shown_rate == 40
  assert all(case.devices == 3 for case in result.cases)
  for rate in result.rates:
    ours, theirs = result.pair(rate)
    assert ours.merit == max(case.merit for case in result.cases if case.rate == rate and not case.colocated)
    assert theirs.merit == max(case.merit for case in result.cases if case.rate == rate and case.colocated)


def test_a_comparison_leaves_a_page_and_figures_for_both(over_rates):
  result, folder = over_rates
  data = json.loads((folder / 'compare.json').read_text())
  assert data['verdict'] == result.verdict() and data['best']['40'] == [case.system for case in result.pair(40)]
  assert len(data['cases']) == 8 and data['cases'][0]['p99_ttft_ms'] == result.cases[0].report.ttft.p99_ms
  text = (folder / 'report.html').read_text()
  assert all(words in text for words in ('Over the rate of requests', 'All that was tried', 'colocated: 3C tp1'))
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


def test_the_engine_compiles_each_cluster_once(monkeypatch):
  deployed = []
  deploy = launch.deploy

  def counted(run, *arguments):
    deployed.append(run.split)
    return deploy(run, *arguments)

  monkeypatch.setattr(compared.launch, 'deploy', counted)
  workload = dataclasses.replace(WORKLOAD, num_requests=6, requests_per_s=100.0)
  small = dataclasses.replace(TINY, num_layers=1)
  run = config(model=small, workload=workload, max_sequences=1, max_step_tokens=16, max_chunks=1, max_fused_steps=1)
  run = dataclasses.replace(run, workers=tuple(dataclasses.replace(one, devices=(0,)) for one in run.workers))
  result = pdjax.compare(run, backend='engine', rates=(100, 200), budgets=(8, 16))
  assert deployed == ['1P1D', '1C']
  assert len(result.cases) == 6 and all(case.report.completed == 6 for case in result.cases)
  assert all(case.report.backend == 'engine' for case in result.cases)
  first, second = (case.report for case in result.cases[:2])
  assert first.total_output_tokens == second.total_output_tokens
  assert max(second.account.ttft_closes_s, first.account.handoff_closes_s) < 1e-6
  assert 'ran once' in result.verdict()[-1]


def test_what_cannot_be_compared_says_why():
  with pytest.raises(ValueError, match=r'the config is the colocated baseline itself \(2C\)'):
    pdjax.compare(config('2C', workload=WORKLOAD))
  with pytest.raises(ValueError, match='rates is empty'):
    pdjax.compare(config(workload=WORKLOAD), rates=())
  with pytest.raises(ValueError, match='has no workload'):
    pdjax.compare(dataclasses.replace(config(), workload=None))
