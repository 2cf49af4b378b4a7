"""The contents of charts, against the report they are made of."""

import csv
import dataclasses
import io
import itertools
import re
import struct
import zlib

import numpy as np
import pytest
import vl_convert

from pdjax.metrics import Report, charts, colours
from pdjax.metrics.timeline import Timeline
from pdjax.types.request import SLO
from pdjax.types.worker import WorkerSpec


def _rows(chart, layer=0):
  """The rows that a layer of a chart draws."""
  spec = chart.to_dict()
  data = spec['layer'][layer].get('data') or spec['data']
  numbers = data['format'].get('parse') or {}
  rows = csv.DictReader(io.StringIO(spec['datasets'][data['name']]))
  return [{name: float(v) if name in numbers and v else v for name, v in row.items()} for row in rows]


def _seconds(report, kind):
  return sum(span.ended_s - span.began_s for span in report.timeline.spans if span.kind == kind)


@pytest.mark.parametrize('run', ['few_requests', 'colocated'])
def test_every_step_of_a_short_run_is_a_bar(run, request):
  report = request.getfixturevalue(run)
  assert charts.slot_seconds(report) is None
  bars = _rows(charts.gantt(report))
  for kind in ('prefill', 'decode', 'fused'):
    mine = [bar for bar in bars if bar['kind'] == kind]
    assert len(mine) == sum(span.kind == kind for span in report.timeline.spans)
    assert sum(bar['b'] - bar['a'] for bar in mine) == pytest.approx(_seconds(report, kind), abs=1e-4)
  rows = {worker.name: row for row, worker in enumerate(report.workers)}
  assert all(rows[bar['worker']] < bar['lo'] < bar['hi'] < rows[bar['worker']] + 1 for bar in bars)
  assert all(bar['b'] <= report.duration_s + 1e-6 for bar in bars)


def test_a_transfer_is_seen_at_both_its_ends(few_requests):
  lines = _rows(charts.gantt(few_requests), layer=1)
  transfers = [span for span in few_requests.timeline.spans if span.kind == 'transfer']
  assert len(lines) == 2 * len(transfers) > 0
  assert {int(line['lo']) for line in lines} == {0, 1}
  assert {line['requests'] for line in lines} == {span.requests[0] for span in transfers}


def test_slots_of_a_long_run_hold_the_time_that_its_steps_took(many_requests):
  slot_s = charts.slot_seconds(many_requests)
  bars = _rows(charts.gantt(many_requests))
  assert len(many_requests.timeline.spans) > charts.MAX_BARS >= len(bars)
  for kind in ('prefill', 'decode'):
    mine = [bar for bar in bars if bar['kind'] == kind]
    assert sum(bar['share'] * slot_s for bar in mine) == pytest.approx(_seconds(many_requests, kind), rel=1e-3)
    assert sum(bar['count'] for bar in mine) == sum(span.kind == kind for span in many_requests.timeline.spans)
    assert all(bar['hi'] - bar['lo'] == pytest.approx(0.62 * bar['share'], abs=2e-4) for bar in mine)


def test_pages_in_use_are_those_of_the_log(few_requests):
  bars = [bar for bar in _rows(charts.pages(few_requests)) if bar['worker'] == 'decode0']
  pages = [use.pages for now in few_requests.timeline.occupancy for use in now.workers if use.worker == 'decode0']
  assert max(bar['count'] for bar in bars) == max(pages) > 0
  assert all(one['b'] <= after['a'] for one, after in itertools.pairwise(bars))
  assert bars[0]['share'] == pytest.approx(bars[0]['count'] / few_requests.workers[1].num_pages, abs=1e-4)


def test_runs_beside_one_another_share_seconds_and_heights(few_requests, many_requests):
  for chart in (charts.gantt, charts.pages):
    alone = [chart(run).to_dict() for run in (few_requests, many_requests)]
    together = [chart(run, beside=(few_requests, many_requests)).to_dict() for run in (few_requests, many_requests)]
    ends_s = [
      [spec['layer'][0]['encoding']['x']['scale']['domain'][1] for spec in specs] for specs in (alone, together)
    ]
    assert ends_s[0] == [few_requests.duration_s, many_requests.duration_s]
    assert ends_s[1] == [max(ends_s[0])] * 2
  few, many = (
    [bar for bar in _rows(charts.pages(run, beside=(few_requests, many_requests))) if bar['worker'] != 'waiting']
    for run in (few_requests, many_requests)
  )
  heights = [(bar['hi'] - bar['lo']) / bar['share'] for bar in (*few, *many) if bar['share'] > 0.05]
  assert max(heights) - min(heights) < 0.02 * max(heights)
  assert _rows(charts.pages(few_requests))[0]['lo'] != few[0]['lo'] or _rows(charts.pages(many_requests)) != many


def test_of_many_levels_every_slot_shows_its_peak():
  rng = np.random.default_rng(0)
  times_s = np.cumsum(rng.exponential(1.0, 1000))
  levels = [
    charts._Level(a, b, int(count), 1)
    for a, b, count in zip(times_s, times_s[1:], rng.integers(1, 50, 999), strict=False)
  ]
  slots = charts._highest(levels, 40)
  assert len(slots) <= 41
  for slot in slots:
    inside = [level.count for level in levels if level.at_s < slot.until_s - 1e-6 and level.until_s > slot.at_s + 1e-6]
    assert slot.count == max(inside)
  assert charts._highest(levels, 1000) is levels


def test_dots_of_latencies_are_the_percentiles_of_the_report(few_requests, colocated):
  for metric in charts.METRICS:
    dots = _rows(charts.latency(few_requests, colocated, metric=metric), layer=1)
    for report in (few_requests, colocated):
      stats = getattr(report, metric)
      mine = {dot['percentile']: dot['ms'] for dot in dots if dot['system'] == report.split}
      expected = {'p50': stats.p50_ms, 'p90': stats.p90_ms, 'p99': stats.p99_ms}
      assert mine == pytest.approx(expected, abs=2e-3)
  with pytest.raises(ValueError, match="'tfft' is unknown; choose one of ttft"):
    charts.latency(few_requests, metric='tfft')


def test_bars_of_the_account_end_where_the_means_are(few_requests, colocated):
  totals = _rows(charts.account(few_requests, colocated), layer=1)
  ends = {total['bar']: total['to'] for total in totals}
  assert ends == pytest.approx(
    {
      'TTFT · 1P1D': few_requests.ttft.mean_ms, 'TTFT · 2C': colocated.ttft.mean_ms,
      'hand-off · 1P1D': few_requests.handoff.mean_ms, 'hand-off · 2C': colocated.handoff.mean_ms,
    },
    abs=2e-3,
  )  # fmt: skip


def test_an_account_of_nothing_has_no_figures(few_requests):
  nothing = Report.from_events([], workers=few_requests.workers)
  assert [total['ms'] for total in _rows(charts.account(nothing), layer=1)] == ['-', '-']


def test_a_limit_is_drawn_where_the_axis_reaches_it(few_requests):
  for factor, drawn in ((0.5, True), (3.0, False)):
    limit = few_requests.ttft.p99_ms * factor
    limited = dataclasses.replace(few_requests, slo=SLO(ttft_ms=limit))
    assert charts.limit_ms(limited, metric='ttft') == (limit, drawn)
    assert len(charts.latency(limited).to_dict()['layer']) == (3 if drawn else 2)


def test_two_runs_on_like_clusters_stay_two_curves(few_requests):
  curves = _rows(charts.latency(few_requests, few_requests))
  assert {row['system'] for row in curves} == {'1P1D', '1P1D (2)'}


def test_figures_that_are_missing_or_zero_are_left_out_of_a_logarithmic_axis():
  curves = {'1P1D': [(1.0, 5.0), (2.0, None), (4.0, 0.0)], 'colocated': [(1.0, 7.0), (2.0, 8.0), (4.0, 9.0)]}
  assert len(_rows(charts.over_rate(curves, 'tail', 'ms', log=True))) == 4
  assert len(_rows(charts.over_rate(curves, 'goodput', 'requests/s'))) == 5
  curves = {'1P1D': list(zip([1.0, 2.0, 4.0, 8.0], [np.nan, np.inf, -1.0, 2.0], strict=True))}
  assert [row['value'] for row in _rows(charts.over_rate(curves, 'tail', 'ms', log=True))] == [2]
  assert [row['value'] for row in _rows(charts.over_rate(curves, 'tail', 'ms'))] == [-1, 2]


def _heights(chart):
  """The height of each point of a chart over the rate, in pixels from below."""
  svg = vl_convert.vegalite_to_svg(chart.to_dict(validate=False))
  points = svg[svg.index('mark-symbol role-mark') :]
  return [200 - float(y) for y in re.findall(r'translate\([\d.]+,([-\d.]+)\)', points[: points.index('</g>')])]


@pytest.mark.parametrize('log', [True, False])
@pytest.mark.parametrize(
  'values',
  [  # milliseconds; the logarithms, or the values themselves, lie as far apart as the points
    [1e-6, 2e-6, 3e-6, 9e-6],  # a few nanoseconds
    [4.9e-6, 5.1e-6, 1e-5, 2e-5],
    [1e-12, 3e-12, 2e-12, 4e-12],
    [1e-6, 1e-2, 1e2, 1e6],  # twelve orders
    [101.2, 101.3, 101.4, 101.9],
    [1.2e7, 1.5e7, 1.9e9, 2.5e9],
    [5.0, 5.0, 5.0, 5.0],
    [3e-7],
  ],
)
def test_points_over_the_rate_lie_where_their_figures_are(values, log):
  curves = {'1P1D': [(2.0**place, value) for place, value in enumerate(values)]}
  heights = np.array(_heights(charts.over_rate(curves, 'tail', 'ms', log=log)))
  assert len(heights) == len(values) and (heights > -1).all() and (heights < 201).all()
  figures = np.log(values) if log else np.array(values)
  if np.ptp(figures) == 0:
    assert np.ptp(heights) == 0
  else:
    expected = (figures - figures[0]) / np.ptp(figures)
    np.testing.assert_allclose((heights - heights[0]) / np.ptp(heights), expected, atol=2e-3)


@pytest.mark.parametrize('scale', [1.0, 1e-3, 1e-6, 1e-9])
def test_a_run_of_any_length_is_drawn_at_its_own_size(disaggregated, stamps, scale):
  """The picture of a run whose every time is so much shorter is the same, but for the numbers at its axes."""

  def shapes(factor):
    shrunk = type(stamps)(**{name: getattr(stamps, name) * factor for name in stamps.__dataclass_fields__})
    report = Report.from_events(disaggregated(shrunk), workers=[WorkerSpec('p', 'prefill'), WorkerSpec('d', 'decode')])
    seconds = [(bar['a'], bar['b']) for layer in (0, 1) for bar in _rows(charts.gantt(report), layer)]
    ms = [[row['ms'] for row in _rows(charts.latency(report, metric='itl'), layer)] for layer in (0, 1)]
    parts = [(bar['from'], bar['to'], bar['ms']) for bar in _rows(charts.account(report))]
    ends = [charts.gantt(report).to_dict()['layer'][0]['encoding']['x']['scale']['domain'][1]]
    return [np.array(rows) / factor for rows in (seconds, *ms, parts, ends)]

  for drawn, expected in zip(shapes(scale), shapes(1.0), strict=True):
    np.testing.assert_allclose(drawn, expected, rtol=1e-5, atol=2e-6)


def test_the_account_of_a_short_run_adds_up_to_a_reader(disaggregated, stamps):
  shrunk = type(stamps)(**{name: getattr(stamps, name) * 1e-6 for name in stamps.__dataclass_fields__})
  report = Report.from_events(disaggregated(shrunk), workers=[WorkerSpec('p', 'prefill'), WorkerSpec('d', 'decode')])
  assert report.ttft_account() == 'TTFT 0.000813 = queue 0.000250 + prefill 0.000563 ms'
  assert [total['ms'] for total in _rows(charts.account(report), layer=1)] == ['0.00081', '0.00075']
  assert '1 of 1 requests completed in 0.0000018 s' in str(report)


def test_what_was_offered_is_a_thin_line():
  curves = {'1P1D': [(1.0, 0.5), (4.0, 2.0)]}
  assert [(row['rate'], row['value']) for row in _rows(charts.over_rate(curves, 'good', 'req/s', ideal=True))] == [
    (1, 1),
    (4, 4),
  ]


def test_a_run_of_nothing_can_be_drawn(few_requests):
  nothing = dataclasses.replace(
    Report.from_events([], workers=few_requests.workers), timeline=Timeline(), utilisation=()
  )
  for chart in (charts.gantt(nothing), charts.pages(nothing), charts.account(nothing), charts.latency(nothing)):
    assert chart.to_dict()['layer']


def test_a_picture_follows_the_theme_of_its_reader(few_requests, tmp_path):
  svg = charts.save(charts.overview(few_requests), tmp_path / 'run.svg').read_text()
  assert 'prefers-color-scheme: dark' in svg
  assert f'fill="{colours.LIGHT["ink"]}"' in svg and f'fill:{colours.DARK["ink"]}' in svg
  assert all(svg.count(f'"{colours.PHASES[kind]}"') for kind in ('prefill', 'decode', 'transfer'))
  assert charts.save(charts.account(few_requests), tmp_path / 'a.png').read_bytes().startswith(b'\x89PNG')
  with pytest.raises(ValueError, match=r'end the name in \.svg or \.png'):
    charts.save(charts.account(few_requests), tmp_path / 'a.pdf')


def _pixels(png):
  """Size and filtered bytes of a PNG."""
  at, data = 8, b''
  while at < len(png):
    length, kind = struct.unpack('>I4s', png[at : at + 8])
    body = png[at + 8 : at + 8 + length]
    assert zlib.crc32(kind + body) == struct.unpack('>I', png[at + 8 + length : at + 12 + length])[0]
    data += body if kind == b'IDAT' else b''
    at += 12 + length
  return png[16:24], zlib.decompress(data)


def test_a_picture_for_a_notebook_is_what_the_renderer_drew_and_half_as_long(few_requests):
  chart = charts.gantt(few_requests, zoom=False)
  picture = charts.picture(chart)
  drawn = vl_convert.vegalite_to_png(chart.to_dict() | {'padding': 8}, scale=2)
  assert _pixels(picture.png) == _pixels(drawn)
  assert len(picture.png) < len(drawn) / 2
  png, shown = picture._repr_png_()
  assert png == picture.png
  assert struct.pack('>II', 2 * shown['width'], 2 * shown['height']) == png[16:24]
  assert shown['alt'] == picture.title == 'What each worker did'


def test_charts_side_by_side_share_a_row_and_a_legend(few_requests, colocated):
  parts = [charts.latency(few_requests, colocated, metric=metric) for metric in ('ttft', 'tpot')]
  whole = charts.side_by_side(*parts)
  assert whole.to_dict()['columns'] == 2
  picture = charts.picture(whole)
  assert picture.title == 'Time to first token; Time per output token'
  assert picture.width < 880
  assert picture.height < charts.picture(parts[0]).height + 20


def _luminance(colour: str) -> float:
  parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
  linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
  return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


@pytest.mark.parametrize('paper', [colours.LIGHT['paper'], colours.DARK['paper']])
def test_every_data_colour_stands_out_on_both_papers(paper):
  for colour in {*colours.PHASES.values(), *colours.PARTS.values(), *colours.SYSTEMS, colours.BASELINE}:
    dark, light = sorted((_luminance(colour), _luminance(paper)))
    assert (light + 0.05) / (dark + 0.05) >= 3, colour
