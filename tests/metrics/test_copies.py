"""Copies of cached blocks in the figures of a run: by way, apart from hand-offs, and what was found at a host."""

import dataclasses

import pytest

import pdjax
from pdjax.metrics import charts
from pdjax.metrics.counters import counters
from pdjax.metrics.perfetto import trace_events
from pdjax.metrics.wording import totals
from pdjax.policies import Disaggregated
from pdjax.types import HostPlace, PrefixCache
from pdjax.workload import Fixed, MultiTurn
from tests.tiny import TINY, config

TOKEN_BYTES = TINY.cached_token_bytes('float32')


@pytest.fixture(scope='module')
def report():
  """Chats whose answers go to a host and come back from there."""
  chats = MultiTurn(num_chats=6, turns=Fixed(3), prompt=Fixed(9), user=Fixed(4), output=Fixed(6), think_s=0.5, seed=1)
  run = config('1P1D', workload=chats)
  policy = Disaggregated(max_prefill_tokens=16, returns_to='host0')
  fields = {'policy': policy, 'places': (HostPlace('host0', 10**6),), 'prefix_cache': PrefixCache(block_tokens=4)}
  return pdjax.simulate(dataclasses.replace(run, **fields)).report


def test_copies_are_counted_by_way_and_not_as_hand_offs(report):
  ways = {(one.source, one.target): one for one in report.copies}
  assert ways.keys() == {('decode0', 'host0'), ('host0', 'prefill0')}
  for one in report.copies:
    assert one.bytes == one.tokens * TOKEN_BYTES > 0 and one.transfers >= 6
  spans = report.timeline.spans
  moved = sum(span.wire_bytes for span in spans if span.kind == 'transfer')
  assert report.wire_bytes == report.transfers.bytes == moved and report.num_transfers == int(spans.is_transfer.sum())
  assert [one['tokens'] for one in report.to_json()['copies']] == [one.tokens for one in report.copies]
  found = counters(report.timeline)
  assert found['pdjax:kv_copied_tokens_total'] == sum(one.tokens for one in report.copies)
  assert found['pdjax:kv_copied_bytes_total'] == sum(one.bytes for one in report.copies)
  assert found['vllm:nixl_bytes_transferred_sum'] == moved


def test_what_a_host_held_is_told_with_its_share(report):
  fetched = report.prefix_hits['prefill']['host0']
  assert report.fetched_tokens() == {'host0': fetched} and 0 < fetched < report.cached_tokens
  assert sum(report.prefix_hits['prefill'].values()) == report.cached_tokens
  rows = dict(totals(report))
  assert rows['found at host0'].startswith(f'{fetched:,}') and rows['decode0 → host0'].endswith('copied')
  assert 'at host0)' in report.hits_account() and 'as they were prefilled' in report.hits_account()


def test_a_trace_and_the_charts_have_the_place_and_what_goes_there(report):
  events = trace_events(report)
  names = {event['args']['name'] for event in events if event['name'] == 'process_name'}
  assert 'host0 (holds pages)' in names
  copies = [event for event in events if event['ph'] == 'X' and event['name'] == 'copy']
  assert len(copies) == sum(one.transfers for one in report.copies) and all(one['args']['request'] for one in copies)
  assert {event['name'] for event in events if event['ph'] in 'stf'} == {'KV'}
  work, held = charts.gantt(report).to_json(), charts.pages(report).to_json()
  assert 'host0' in work and 'copy' in work and 'host0' in held


def test_the_use_of_a_worker_tells_copies_apart(report):
  prefill, decode = report.utilisation
  assert prefill.copy > 0 and decode.copy > 0 and prefill.transfer > 0
  spans = report.timeline.spans
  steps = sum(span.ended_s - span.began_s for span in spans if span.worker == 'decode0' and not span.moves)
  assert decode.busy == pytest.approx(steps / report.duration_s, rel=1e-6)
