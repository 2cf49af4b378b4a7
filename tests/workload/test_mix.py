"""A mix has its shares to the request at one rate, the same at another, and refuses what cannot be mixed."""

import collections
import dataclasses
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
  TraceWorkload,
  Uniform,
)
from pdjax.workload.workload import WorkloadContext
from tests import tiny
from tests.workload.sources import all_requests

CONTEXT = WorkloadContext(vocab_size=1000, context_len=8192)
SHORT = {'prompt': Uniform(3, 9), 'output': Uniform(1, 6)}
CHAT, CODE = Poisson(**SHORT), Constant(prompt=Fixed(20), output=Uniform(1, 6), num_requests=3)
TALK = MultiTurn(turns=Uniform(1, 5), max_concurrency=None, **SHORT, user=Fixed(2))


def mix(*parts, **fields):
  return Mix(parts or (Share(CHAT, 0.7, 'chat'), Share(CODE, 0.3, 'code')), **fields)


def by_class(requests):
  return collections.Counter(request.class_name for request in requests)


@pytest.mark.parametrize(
  ('shares', 'count', 'expected'),
  [
    ((0.7, 0.3), 100, (70, 30)),
    ((7, 3), 10, (7, 3)),
    ((2, 1), 10, (7, 3)),
    ((1, 1e-9), 5, (5, 0)),
    ((1, 1), 1, (1, 0)),
  ],
)
def test_shares_are_kept_to_the_request(shares, count, expected):
  whole = mix(Share(CHAT, shares[0], 'chat'), Share(CODE, shares[1], 'code'), num_requests=count)
  requests, _ = all_requests(whole, CONTEXT)
  assert len(requests) == whole.num_requests == count
  assert tuple(by_class(requests)[name] for name in ('chat', 'code')) == expected


def test_requests_are_those_of_their_part_in_an_order_of_its_own_for_each_seed():
  requests, arrivals = all_requests(mix(num_requests=40), CONTEXT)
  assert {one.id for one in requests if one.class_name == 'chat'} == {f'chat/request-{i}' for i in range(28)}
  assert all(one.id.startswith('code/') == (one.prompt_len == 20) for one in requests)
  assert len({arrivals.output_len(one.id) for one in requests}) > 4
  order = [one.class_name for one in requests]
  assert order != sorted(order) and order != [one.class_name for one in all_requests(mix(seed=1), CONTEXT)[0]][:40]
  assert all_requests(mix(num_requests=40), CONTEXT)[0] == requests


def test_another_rate_meets_the_same_requests():
  slow, fast = (all_requests(at_rate(mix(num_requests=30), rate), CONTEXT)[0] for rate in (1, 8))
  np.testing.assert_allclose([one.arrival_s for one in slow], [8 * one.arrival_s for one in fast])
  assert [(one.id, one.prompt) for one in slow] == [(one.id, one.prompt) for one in fast]


@pytest.mark.parametrize('burstiness', [0.25, 1.0])
def test_all_come_at_one_rate_and_a_part_at_its_share_of_it(burstiness):
  requests, _ = all_requests(mix(requests_per_s=8.0, num_requests=20_000, burstiness=burstiness), CONTEXT)
  gaps = np.diff([one.arrival_s for one in requests])
  assert gaps.mean() == pytest.approx(1 / 8, rel=0.03)
  assert gaps.std() / gaps.mean() == pytest.approx(1 / math.sqrt(burstiness), rel=0.05)
  code = np.diff([one.arrival_s for one in requests if one.class_name == 'code'])
  assert code.mean() == pytest.approx(1 / 2.4, rel=0.05)
  assert burstiness < 1 or code.std() / code.mean() == pytest.approx(1, rel=0.05)  # a part of a Poisson process is one


def test_an_infinite_rate_brings_all_at_once():
  assert {one.arrival_s for one in all_requests(mix(requests_per_s=math.inf), CONTEXT)[0]} == {0.0}


def test_parts_with_one_seed_draw_unlike_prompts():
  requests, _ = all_requests(mix(Share(CHAT, 1, 'a'), Share(CHAT, 1, 'b'), num_requests=40), CONTEXT)
  assert len({one.sampling.seed for one in requests}) == 40
  mine, theirs = ([len(one.prompt) for one in requests if one.class_name == name] for name in 'ab')
  assert mine != theirs


def test_a_share_says_class_priority_deadline_and_tenant():
  given = Given((Request('r', (1,), priority=3, deadline_s=9.0, tenant='eve', class_name='old'),))
  told = Share(CHAT, 1, 'chat', priority=-1, deadline_s=0.5, tenant='ann')
  requests, _ = all_requests(mix(told, Share(given, 1, 'given'), num_requests=2), CONTEXT)
  said = {one.class_name: (one.priority, one.deadline_s, one.tenant) for one in requests}
  assert said == {'chat': (-1, 0.5, 'ann'), 'given': (3, 9.0, 'eve')}


def test_chats_have_their_share_of_turns():
  whole = mix(Share(TALK, 0.5, 'talk'), Share(CHAT, 0.5, 'chat'), num_requests=200, requests_per_s=4.0)
  requests, _ = all_requests(whole, CONTEXT)
  assert by_class(requests) == {'talk': 100, 'chat': 100} and whole.num_requests == 200
  assert len({one.id for one in requests}) == 200
  starts = [one.arrival_s for one in requests if one.class_name == 'chat' or one.id.endswith('turn-0')]
  assert 100 < len(starts) < 170
  assert max(starts) == pytest.approx(200 / 4.0, rel=0.25)  # so that all requests together come at the rate
  sessions = {one.session for one in requests if one.class_name == 'talk'}
  assert all(name.startswith('talk/chat-') for name in sessions) and len(sessions) == len(starts) - 100


def test_a_trace_gives_the_first_of_its_requests_and_no_more_than_it_has(tmp_path):
  path = tmp_path / 'trace.jsonl'
  line = '{{"timestamp": {}, "input_length": {}, "output_length": {}, "hash_ids": [{}]}}\n'
  path.write_text(''.join(line.format(1000 * i, 100 + i, 1 + i, i % 2) for i in range(6)))
  trace = TraceWorkload(path=str(path))
  whole = mix(Share(trace, 1, 'a'), Share(trace, 1, 'b'), num_requests=8)
  requests, arrivals = all_requests(whole, CONTEXT)
  first = [one for one in requests if one.class_name == 'a']
  assert [one.prompt_len for one in first] == [100, 101, 102, 103]
  assert [arrivals.output_len(one.id) for one in first] == [1, 2, 3, 4]
  assert first[0].block_hashes == first[2].block_hashes != first[1].block_hashes
  assert not {one.block_hashes for one in first} & {one.block_hashes for one in requests if one.class_name == 'b'}
  with pytest.raises(ValueError, match=r"the part 'a' of the mix has 6 requests, but its share is 7 of them; lower"):
    dataclasses.replace(whole, num_requests=14).arrivals(CONTEXT)


def test_what_cannot_be_mixed_is_refused_where_it_is_made():
  for workload, words in (
    (ClosedLoopWorkload(), 'whose users wait for answers'),
    (MultiTurn(), r'MultiTurn\(max_concurrency=8\).*set max_concurrency=None'),
    (mix(), 'expected a single workload'),
    (Phases((Phase(CHAT, 1),)), 'a Mix may be a part of Phases'),
  ):
    with pytest.raises(ValueError, match=words):
      Share(workload, 1, 'a')
  with pytest.raises(ValueError, match="several parts of class_name='a'"):
    mix(Share(CHAT, 1, 'a'), Share(CODE, 1, 'a'))


def test_a_workload_of_ones_own_must_have_times_of_its_own():
  class Answering(type(Given(()))):
    def arrivals(self, context):
      return ClosedLoopWorkload(num_requests=3, **SHORT).arrivals(context)

  with pytest.raises(
    ValueError, match="the part 'a' of the mix is a Answering, whose requests come in answer to other"
  ):
    mix(Share(Answering((Request('r', (1,)),)), 1, 'a'), num_requests=1).arrivals(CONTEXT)


def test_a_share_and_a_field_of_a_part_are_set_by_its_class():
  config = dataclasses.replace(tiny.config(), workload=mix())
  config = apply_overrides(config, ['workload.parts.code.share=0.7', 'workload.parts.chat.workload.prompt.low=4'])
  assert config.workload.parts[1].share == 0.7 and config.workload.parts[0].workload.prompt.low == 4


def test_the_report_finds_rate_burstiness_and_what_repeats():
  whole = mix(requests_per_s=3.0, burstiness=0.5, seed=4)
  assert (whole.request_rate, whole.burstiness, whole.max_concurrency, whole.seed) == (3.0, 0.5, None, 4)
  assert not whole.repeats and mix(Share(CHAT, 1, 'a'), Share(TALK, 1, 'b')).repeats
  assert mix(Share(Poisson(prompts=('a',)), 1, 'a')).repeats


def test_a_mix_is_served_with_chats_in_virtual_time_and_counted_by_class():
  parts = Share(CHAT, 0.6, 'chat', deadline_s=1e-9), Share(TALK, 0.4, 'talk', deadline_s=1e9)
  report = pdjax.simulate(tiny.config(workload=mix(*parts, num_requests=30, requests_per_s=1000.0))).report
  assert report.completed == report.num_prompts
  assert report.by_class['chat'].num_prompts == 18 and report.by_class['chat'].deadline_share == 0
  assert 8 <= report.by_class['talk'].num_prompts <= 12 and report.by_class['talk'].deadline_share == 1


def test_bursty_parts_count_by_their_requests_alone():
  """The times of a part do not count, so neither does what it says of them."""
  plain, bursty = (mix(Share(kind(**SHORT), 1, 'a'), num_requests=20) for kind in (Poisson, Bursty))
  assert all_requests(plain, CONTEXT)[0] == all_requests(bursty, CONTEXT)[0]
