"""Hits of the prefix cache in the figures of a run, against the events of its log."""

import dataclasses
import io

import pytest
from rich.console import Console

import pdjax
from pdjax.metrics import Report, perfetto, print_report, read_timeline
from pdjax.metrics.hit_rows import HitRows
from pdjax.serving.events import BlockStored, PrefixHit, Started
from pdjax.serving.orders import StepOrder
from pdjax.types import PrefixCache
from pdjax.types.worker import Role, WorkerSpec
from pdjax.workload import Given
from tests import tiny


def hits_of(result: pdjax.RunResult) -> list[PrefixHit]:
  return [event for event in result.events if isinstance(event, PrefixHit)]


def test_the_rows_are_the_events(with_hits):
  hits = hits_of(with_hits)
  assert len(hits) > 10 and list(with_hits.report.timeline.hits) == hits
  assert with_hits.report.timeline == read_timeline(with_hits.events)
  assert list(HitRows()) == [] and HitRows().tokens() == {}


def test_totals_by_side_and_place_are_those_of_the_log(with_hits):
  totals: dict[str, dict[str, int]] = {}
  for hit in hits_of(with_hits):
    places = totals.setdefault(hit.side, {})
    places[hit.place] = places.get(hit.place, 0) + hit.tokens
  report = with_hits.report
  assert report.prefix_hits == totals == report.to_json()['prefix_hits']
  assert totals['prefill'].keys() == {'prefill0', 'prefill1'} and totals['decode'].keys() == {'decode0'}
  assert sum(totals['prefill'].values()) == report.cached_tokens == report.hit_tokens('prefill')
  asked = sum(one.request.prompt_len for one in with_hits.completions)
  assert report.begun_tokens == asked == report.to_json()['begun_tokens']


def test_a_request_begins_at_the_turn_that_hands_it_over(with_hits):
  begun_s: dict[str, float] = {}
  for event in with_hits.events:
    if isinstance(event, Started) and isinstance(event.order, StepOrder):
      for chunk in event.order.chunks:
        begun_s.setdefault(chunk.request.id, event.now_s)
  requests = with_hits.report.timeline.requests
  assert {one.id: one.begun_s for one in requests if one.begun_s is not None} == begun_s
  hits = {hit.request: hit.now_s for hit in hits_of(with_hits) if hit.side == 'prefill'}
  assert hits.items() <= begun_s.items()


def test_of_samples_the_prompt_is_asked_for_once():
  request = pdjax.Request('r', tiny.prompt(9), pdjax.SamplingParams(max_tokens=3, n=3))
  report = pdjax.simulate(tiny.config(workload=Given((request,)))).report
  assert report.begun_tokens == 9
  assert [one.begun_s is None for one in report.timeline.requests] == [False, True, True]


def test_words_say_what_was_found(with_hits):
  report = with_hits.report
  prefill, decode = (f'{report.hit_tokens(side) / report.begun_tokens:.1%}' for side in ('prefill', 'decode'))
  assert report.hits_account() == (
    f'of {report.begun_tokens:,} prompt tokens asked for, {prefill} were cached as they were prefilled and '
    f'{decode} where they decoded'
  )
  assert f'{report.cached_tokens:,} of {report.total_input_tokens:,} input tokens were cached' in str(report)
  printed = _printed(report)
  assert f'{report.cached_tokens}, {prefill}' in printed and f'{report.hit_tokens("decode")}, {decode}' in printed


@pytest.mark.parametrize('length', [2, 9], ids=['no whole block', 'nothing alike'])
def test_a_cache_in_which_nothing_was_found_is_told(length):
  config = tiny.config(workload=Given(tiny.requests((length, length), max_tokens=1)))
  off = pdjax.simulate(dataclasses.replace(config, prefix_cache=None)).report
  on = pdjax.simulate(dataclasses.replace(config, prefix_cache=PrefixCache(block_tokens=4)))
  assert any(isinstance(event, BlockStored) for event in on.events) == (length > 4)
  assert 'the prefix cache was on, and nothing was found in it' in str(on.report)
  assert 'cached tokens' in _printed(on.report) and '0, 0.0%' in _printed(on.report)
  assert on.report.caches and on.report.to_json()['prefix_hits'] == {}
  assert not off.caches and off.to_json()['prefix_hits'] is None
  assert 'cache' not in str(off) and 'cache' not in _printed(off)
  neither = pdjax.simulate(config).report  # pages of 4 tokens
  assert 'No prefixes were kept, as pages of 4 tokens are no whole blocks of 16; prefix_cache=' in str(neither)


def test_the_log_alone_says_that_there_was_a_cache(with_hits, few_requests):
  assert Report.from_events(with_hits.events, workers=with_hits.workers).caches
  stored = [BlockStored(1.0, 'd', bytes(16), bytes(16), 4)]
  assert Report.from_events(stored, workers=few_requests.workers).caches
  assert not few_requests.caches


def test_a_trace_marks_hits_and_counts_what_is_cached(with_hits, few_requests, log):
  events = perfetto.trace_events(with_hits.report)
  marks = [event for event in events if event['ph'] == 'i']
  told = [(hit.request, hit.place, hit.tokens, f'prefix hit, {hit.side}') for hit in hits_of(with_hits)]
  assert sorted((*mark['args'].values(), mark['name']) for mark in marks) == sorted(told)
  cached = [event['args']['pages'] for event in events if event['name'] == 'pages cached']
  assert len(cached) > 10 and min(cached) >= 0 < max(cached)
  assert not any(event['name'] == 'pages cached' for event in perfetto.trace_events(few_requests))
  log.turn(1.0)
  log.arrive('r')
  log.events.append(PrefixHit(1.0, 'r', 'host', 16, 'prefill'))
  workers = (WorkerSpec('p', Role.PREFILL, num_pages=8), WorkerSpec('d', Role.DECODE, num_pages=8))
  (mark,) = [one for one in perfetto.trace_events(Report.from_events(log.events, workers=workers)) if one['ph'] == 'i']
  assert mark['pid'] == 1 and mark['args']['place'] == 'host'  # where what belongs to no worker is


def _printed(report: Report) -> str:
  text = io.StringIO()
  print_report(report, Console(file=text, width=100))
  return text.getvalue()
