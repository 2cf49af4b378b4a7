"""Phases follow one another: requests fall into their seconds, fill them where there is a rate, and all differ."""

import collections
import dataclasses
import itertools
import math

import numpy as np
import pytest

import pdjax
from pdjax.comparison.systems import at_rate
from pdjax.overrides import apply_overrides
from pdjax.types.request import Request
from pdjax.workload import (
  Bursty,
  ClosedLoopWorkload,
  Constant,
  Fixed,
  Given,
  Mix,
  MultiTurn,
  Phase,
  Phases,
  Poisson,
  Share,
  Uniform,
)
from pdjax.workload.workload import WorkloadContext
from tests import tiny
from tests.workload.sources import all_requests

CONTEXT = WorkloadContext(vocab_size=1000, context_len=8192)
SHORT = {'prompt': Uniform(3, 9), 'output': Uniform(1, 6)}
SLOW, FAST = Poisson(requests_per_s=2.0, **SHORT), Bursty(requests_per_s=8.0, **SHORT)
CHANGING = Phases((Phase(SLOW, 60), Phase(FAST, 40), Phase(SLOW, 60)))


def by_phase(requests):
  phases = collections.defaultdict(list)
  for request in requests:
    phases[request.id.partition('/')[0]].append(request)
  return list(phases.values())


def test_requests_fall_into_their_phases_and_fill_them_whatever_num_requests_says():
  requests, _ = all_requests(CHANGING, CONTEXT)
  assert len(requests) == CHANGING.num_requests and len({one.id for one in requests}) == len(requests)
  for phase, (start_s, stop_s) in zip(by_phase(requests), ((0, 60), (60, 100), (100, 160)), strict=True):
    times_s = [one.arrival_s for one in phase]
    assert times_s[0] == start_s and stop_s - 5 < times_s[-1] < stop_s and sorted(times_s) == times_s
  counts = [len(phase) for phase in by_phase(requests)]
  assert counts[0] == pytest.approx(120, rel=0.3) and counts[1] == pytest.approx(320, rel=0.3)


def test_the_same_workload_draws_other_requests_in_each_phase():
  first, _, last = by_phase(all_requests(CHANGING, CONTEXT)[0])
  assert not {one.sampling.seed for one in first} & {one.sampling.seed for one in last}
  assert [one.prompt_len for one in first] != [one.prompt_len for one in last]
  again = all_requests(CHANGING, CONTEXT)[0]
  assert again[: len(first)] == first
  assert all_requests(dataclasses.replace(CHANGING, seed=1), CONTEXT)[0] != again


def test_at_another_rate_the_phases_are_scaled_and_begin_with_the_same_requests():
  own = (2 * 60 + 8 * 40 + 2 * 60) / 160
  assert CHANGING.request_rate == pytest.approx(own)
  twice = at_rate(CHANGING, 2 * own)
  assert twice.request_rate == pytest.approx(2 * own)
  assert twice.num_requests == pytest.approx(2 * CHANGING.num_requests, rel=0.15)
  for slow, fast in zip(*(by_phase(all_requests(one, CONTEXT)[0]) for one in (CHANGING, twice)), strict=True):
    assert [one.prompt for one in fast[: len(slow)]] == [one.prompt for one in slow]
    slow_s, fast_s = (np.array([one.arrival_s for one in phase[: len(slow)]]) for phase in (slow, fast))
    np.testing.assert_allclose(slow_s - slow_s[0], 2 * (fast_s - fast_s[0]))


def test_phases_without_a_rate_are_not_scaled():
  for workload in (ClosedLoopWorkload(), MultiTurn(), Poisson(requests_per_s=math.inf), Given((Request('r', (1,)),))):
    phases = Phases((Phase(SLOW, 5), Phase(workload, 5)))
    assert phases.request_rate is None
    with pytest.raises(ValueError, match=f'a phase of {type(workload).__name__} has no rate that could be scaled'):
      at_rate(phases, 4)


def test_only_the_last_phase_may_have_no_end_and_then_num_requests_counts():
  endless = Phases((Phase(SLOW, 5), Phase(dataclasses.replace(FAST, num_requests=9), math.inf)))
  assert [len(one) for one in by_phase(all_requests(endless, CONTEXT)[0])][1] == 9
  assert endless.request_rate == pytest.approx((10 + 9) / (5 + 9 / 8))
  with pytest.raises(ValueError, match=r'phases\[0\].seconds=inf, but others follow'):
    Phases((Phase(SLOW, math.inf), Phase(SLOW, 5)))
  with pytest.raises(ValueError, match="put its phases among the others'"):
    Phase(CHANGING, 5)


def test_a_mix_changes_with_its_phases():
  mix = Mix((Share(SLOW, 3, 'chat'), Share(FAST, 1, 'code')), requests_per_s=4.0)
  chats = MultiTurn(turns=Fixed(3), max_concurrency=None, **SHORT, user=Fixed(2))
  talk = Mix((Share(chats, 1, 'talk'), Share(FAST, 1, 'code')), requests_per_s=4.0)
  first, second = by_phase(all_requests(Phases((Phase(mix, 50), Phase(talk, 50))), CONTEXT)[0])
  assert len(first) == pytest.approx(200, rel=0.2) and len(second) == pytest.approx(200, rel=0.2)
  assert collections.Counter(one.class_name for one in first)['code'] == pytest.approx(len(first) / 4, abs=1)
  assert first[0].id.startswith('phase-0/c') and {one.class_name for one in second} == {'talk', 'code'}
  assert max(one.arrival_s for one in second) < 100


def test_users_and_chats_end_with_their_phase():
  users = ClosedLoopWorkload(num_requests=500, max_concurrency=2, think_s=0.5, **SHORT)
  chats = MultiTurn(num_chats=3, turns=Fixed(200), think_s=0.5, prompt=Fixed(2), user=Fixed(1), output=Fixed(1))
  first, second = by_phase(all_requests(Phases((Phase(users, 20), Phase(chats, 10))), CONTEXT)[0])
  assert 20 < len(first) < 100 and max(one.arrival_s for one in first) < 20
  assert 3 < len(second) < 100 and min(one.arrival_s for one in second) >= 20
  assert max(one.arrival_s for one in second) < 30


def test_the_report_finds_concurrency_where_every_phase_has_one():
  few, many = (Phase(ClosedLoopWorkload(max_concurrency=users), 5) for users in (3, 7))
  assert Phases((few, many)).max_concurrency == 7 and Phases((few, Phase(SLOW, 5))).max_concurrency is None
  assert (CHANGING.burstiness, CHANGING.seed, CHANGING.repeats) == (None, 0, False)
  assert Phases((Phase(SLOW, 1), Phase(MultiTurn(), 1))).repeats


def test_a_field_of_a_phase_is_set_by_its_number():
  config = dataclasses.replace(tiny.config(), workload=CHANGING)
  config = apply_overrides(config, ['workload.phases.1.workload.requests_per_s=3', 'workload.phases.1.seconds=7'])
  assert config.workload.phases[1] == Phase(dataclasses.replace(FAST, requests_per_s=3.0), 7.0)


def test_phases_of_every_sort_are_served_in_virtual_time():
  workload = Phases((
    Phase(Constant(requests_per_s=500.0, **SHORT), 0.02),
    Phase(ClosedLoopWorkload(num_requests=1000, max_concurrency=2, **SHORT), 0.02),
    Phase(MultiTurn(num_chats=4, turns=Fixed(3), prompt=Fixed(4), user=Fixed(2), output=Fixed(3)), 0.02),
    Phase(Given(tiny.requests((3, 4))), math.inf),
  ))  # fmt: skip
  result = pdjax.simulate(tiny.config(workload=workload))
  assert result.report.completed == result.report.num_prompts > 20
  arrivals = [(one.arrival_s, one.id.partition('/')[0]) for one in result.report.timeline.requests]
  assert arrivals == sorted(arrivals)
  edges = {'phase-0': (0, 0.02), 'phase-1': (0.02, 0.04), 'phase-2': (0.04, 0.06), 'phase-3': (0.06, 0.061)}
  found = {name: [at_s for at_s, _ in group] for name, group in itertools.groupby(arrivals, lambda one: one[1])}
  assert found.keys() == edges.keys()
  for name, (start_s, stop_s) in edges.items():
    assert min(found[name]) == pytest.approx(start_s) and max(found[name]) < stop_s
