"""Prefix hits over time, against the events of the log."""

import dataclasses
import math

import pytest

from pdjax.metrics import Report, charts, read_timeline
from pdjax.metrics.colours import SYSTEMS
from pdjax.serving.events import PrefixHit, Started
from pdjax.serving.orders import StepOrder
from tests.metrics.charts.drawn import drawn_rows


def expected(result) -> tuple[dict, dict]:
  """Tokens asked for by interval, and found by side, place and interval."""
  width_s, start_s = charts.interval_s([result.report]), min(one.request.arrival_s for one in result.completions)
  slots: dict[str, int] = {}
  asked: dict[int, int] = {}
  for event in result.events:
    if isinstance(event, Started) and isinstance(event.order, StepOrder):
      for chunk in event.order.chunks:
        if chunk.request.id not in slots:
          slot = slots[chunk.request.id] = math.floor((event.now_s - start_s) / width_s + 1e-9)
          asked[slot] = asked.get(slot, 0) + chunk.request.prompt_len
  found: dict[tuple[str, str, int], int] = {}
  for event in result.events:
    if isinstance(event, PrefixHit):
      key = event.side, event.place, slots[event.request]
      found[key] = found.get(key, 0) + event.tokens
  return asked, found


def test_bars_are_what_was_asked_for_and_found_in_each_interval(with_hits):
  width_s = charts.interval_s([with_hits.report])
  asked, found = expected(with_hits)
  bars = drawn_rows(charts.prefix_hits(with_hits.report))
  for side in ('prefill', 'decode'):
    grey = [bar for bar in bars if bar['of'] == 'asked for' and bar['side'] == side]
    assert {round(bar['a'] / width_s): bar['tokens'] for bar in grey} == asked
  coloured = [bar for bar in bars if bar['of'] != 'asked for']
  assert {(bar['side'], bar['place'], round(bar['a'] / width_s)): bar['tokens'] for bar in coloured} == found
  assert len({place for _, place, _ in found}) == 3 and len(asked) > 5
  for bar in coloured:
    assert bar['share'] == pytest.approx(bar['tokens'] / asked[round(bar['a'] / width_s)], abs=1e-4)


def test_places_stand_on_one_another_in_front_of_what_was_asked_for(with_hits):
  bars = drawn_rows(charts.prefix_hits(with_hits.report))
  shares = {(bar['hi'] - bar['lo']) / bar['tokens'] for bar in bars}
  assert max(shares) - min(shares) < 1e-4  # one scale for all
  for side, row in (('prefill', 0), ('decode', 1)):
    for a in {bar['a'] for bar in bars if bar['side'] == side}:
      grey, *stack = [bar for bar in bars if bar['side'] == side and bar['a'] == a]  # drawn in this order
      assert grey['of'] == 'asked for' and grey['hi'] == row + 0.94
      below = grey['hi']
      for bar in stack:
        assert bar['hi'] == pytest.approx(below, abs=2e-4)
        below = bar['lo']
      assert below >= grey['lo'] - 2e-4


def test_a_run_that_sends_nothing_has_one_row(colocated_with_hits):
  bars = drawn_rows(charts.prefix_hits(colocated_with_hits))
  assert {bar['side'] for bar in bars} == {'prefill'} and {bar['place'] for bar in bars} == {
    'asked for',
    'both0',
    'both1',
  }


def test_runs_beside_one_another_share_seconds_intervals_and_colours(with_hits, colocated_with_hits):
  runs = with_hits.report, dataclasses.replace(colocated_with_hits, duration_s=1.0)
  specs = [charts.prefix_hits(run, beside=runs).to_dict()['layer'][0]['encoding'] for run in runs]
  assert [spec['x']['scale']['domain'] for spec in specs] == [[0, 1.0]] * 2
  assert specs[0]['color'] == specs[1]['color']
  assert specs[0]['color']['scale']['domain'] == [name for name, _ in charts.place_colours(runs)]
  for run in runs:
    bars = [bar for bar in drawn_rows(charts.prefix_hits(run, beside=runs)) if bar['of'] == 'asked for']
    slots = [bar['a'] / charts.interval_s(runs) for bar in bars]
    assert slots == pytest.approx([round(slot) for slot in slots], abs=1e-3)
    assert sum(bar['tokens'] for bar in bars if bar['side'] == 'prefill') == run.begun_tokens


def test_of_many_places_those_with_most_hits_have_colours_and_no_token_is_lost(with_hits):
  """Places that are no workers, each with another share of the hits."""
  hits = [event for event in with_hits.events if isinstance(event, PrefixHit) and event.side == 'prefill']
  places = iter(f'host{number % 9}' for number in range(len(hits)))
  moved = [
    dataclasses.replace(event, place=next(places)) if event in hits else event
    for event in with_hits.events
    if not (isinstance(event, PrefixHit) and event.side == 'decode')
  ]
  report = Report.from_events(read_timeline(moved), workers=with_hits.workers)
  *shown, others, asked = (name for name, _ in charts.place_colours([report]))
  assert len(shown) == len(SYSTEMS) - 1 and (others, asked) == ('other places', 'asked for')
  assert len(set(dict(charts.place_colours([report])).values())) == len(SYSTEMS) + 1
  counts = report.prefix_hits['prefill']
  assert min(counts[place] for place in shown) >= max(counts[place] for place in counts.keys() - {*shown})
  bars = [bar for bar in drawn_rows(charts.prefix_hits(report)) if bar['of'] != 'asked for']
  drawn = {place: sum(bar['tokens'] for bar in bars if bar['place'] == place) for place in counts}
  assert drawn == counts
  assert {bar['place'] for bar in bars if bar['of'] == 'other places'} == counts.keys() - {*shown}


@pytest.mark.parametrize(('duration_s', 'seconds'), [(613, 10), (80, 2), (79, 1), (0.119, 0.002), (0, 2e-5)])
def test_intervals_are_round(few_requests, duration_s, seconds):
  assert charts.interval_s([dataclasses.replace(few_requests, duration_s=duration_s)]) == pytest.approx(seconds)
