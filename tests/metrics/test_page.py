"""The page: what is on it, how large it is, and that a browser shows it without a complaint."""

import copy
import dataclasses
import json
import re

import pytest

from pdjax.metrics import Beside, OverRate, Report, charts, draw, page, save_html, wording
from pdjax.types.request import SLO
from tests import browser

DRAWN = """new Promise((resolve, reject) => {
  const since = Date.now();
  const look = () => {
    const {drawn, failed} = document.body.dataset;
    if (drawn) resolve(Number(drawn));
    else if (failed || Date.now() - since > 30000) reject(new Error(failed || 'nothing was drawn in 30 s'));
    else setTimeout(look, 20);
  };
  look();
})"""
SHOWN = '[...document.querySelectorAll("[data-over-time]")].map(e => e.view.scale("x").domain())'


@pytest.fixture(scope='module')
def long_page(many_requests, tmp_path_factory):
  """Ten thousand requests and as many of a baseline, over three rates."""
  curves = {name: [(rate, rate * slope) for rate in (1, 2, 4)] for name, slope in (('2P1D', 0.9), ('colocated', 0.8))}
  beside = Beside(
    many_requests, '3C tp4, 512 tokens', verdict=('2P1D wins on nothing.',),
    over_rate=(OverRate('Goodput', 'requests/s', curves), OverRate('TTFT, p99', 'ms', curves, log=True)),
    baseline_curve='colocated', head=('system', 'goodput'), rows=(('2P1D', '1.0'), ('3C', '1.1')), best=frozenset({0}),
  )  # fmt: skip
  return save_html(many_requests, tmp_path_factory.mktemp('page'), beside)


@pytest.fixture(scope='module')
def window():
  command = browser.find()
  if command is None:
    pytest.skip(f'none of the browsers {", ".join(browser.NAMES)} is here')
  with browser.Browser(command) as opened:
    yield opened


@pytest.mark.parametrize('width', [1280, 400])
@pytest.mark.parametrize('dark', [False, True], ids=['light', 'dark'])
def test_ten_thousand_requests_open_in_a_browser_without_a_complaint(window, long_page, dark, width):
  window.complaints.clear()
  window.open(long_page, dark=dark, width=width)
  charts = window.evaluate(DRAWN)
  assert charts == 2 + 1 + 2 + 2 + 5  # over the rate, account, workers, pages, latencies
  assert window.complaints == []
  assert window.evaluate('document.documentElement.scrollWidth') <= width
  assert window.evaluate('[...document.querySelectorAll("canvas")].every(c => c.clientWidth > 200)')
  paper = window.evaluate('getComputedStyle(document.body).backgroundColor')
  assert paper == ('rgb(15, 20, 25)' if dark else 'rgb(255, 255, 255)')


def test_charts_over_time_move_together(window, long_page):
  window.open(long_page, dark=False, width=1280)
  window.evaluate(DRAWN)
  before = window.evaluate(SHOWN)
  assert len(before) == 4 and all(domain == before[0] for domain in before)
  window.evaluate('document.querySelector("[data-zoom]").click()')
  window.evaluate('new Promise(resolve => setTimeout(resolve, 200))')
  after = window.evaluate(SHOWN)
  assert all(domain == after[0] for domain in after)
  assert after[0][1] - after[0][0] == pytest.approx((before[0][1] - before[0][0]) / 2)
  assert window.complaints == []


@pytest.mark.parametrize('width', [1280, 400])
@pytest.mark.parametrize('dark', [False, True], ids=['light', 'dark'])
def test_hits_and_cached_pages_are_shown_without_a_complaint(
  window, with_hits, colocated_with_hits, tmp_path, dark, width
):
  window.complaints.clear()
  window.open(save_html(with_hits.report, tmp_path, Beside(colocated_with_hits)), dark=dark, width=width)
  assert window.evaluate(DRAWN) == 1 + 2 + 2 + 2 + 5  # account, workers, pages, hits, latencies
  assert window.complaints == [] and window.evaluate('document.documentElement.scrollWidth') <= width
  heights = 'document.querySelectorAll("#hits canvas")'
  assert window.evaluate(f'[...{heights}].map(c => c.clientHeight > 60 && c.clientWidth > 200)') == [True, True]
  before = window.evaluate(SHOWN)
  window.evaluate('document.querySelector("#hits [data-zoom]").click()')
  window.evaluate('new Promise(resolve => setTimeout(resolve, 200))')
  after = window.evaluate(SHOWN)
  assert len(after) == 6 and all(domain == after[0] != before[0] for domain in after)


@pytest.mark.parametrize('longer_first', [True, False])
def test_the_whole_run_is_that_of_the_longest(window, few_requests, colocated, tmp_path, longer_first):
  requests = copy.copy(colocated.timeline.requests)
  requests.rows = requests.rows.copy()
  requests.rows['finished_s'][-1] += 7.0
  timeline = dataclasses.replace(colocated.timeline, requests=requests)
  longer = dataclasses.replace(colocated, timeline=timeline, duration_s=timeline.duration_s)
  runs = (longer, few_requests) if longer_first else (few_requests, longer)
  window.open(save_html(runs[0], tmp_path, Beside(runs[1])), dark=False, width=1280)
  window.evaluate(DRAWN)
  whole = [[0, pytest.approx(longer.duration_s)]] * 4
  assert window.evaluate(SHOWN) == whole
  window.evaluate('document.querySelector("[data-zoom]").click()')
  window.evaluate('new Promise(resolve => setTimeout(resolve, 200))')
  assert window.evaluate(SHOWN) != whole
  window.evaluate('document.querySelector("[data-all]").click()')
  window.evaluate('new Promise(resolve => setTimeout(resolve, 200))')
  assert window.evaluate(SHOWN) == whole


def test_a_page_whose_chart_breaks_says_so(window, few_requests, tmp_path):
  path = tmp_path / 'broken.html'
  path.write_text(re.sub(r'"layer":\[', '"layer":[null,', page.render_html(few_requests), count=1))
  window.complaints.clear()
  window.open(path, dark=False, width=1280)
  with pytest.raises(AssertionError, match='null'):
    window.evaluate(DRAWN)
  assert window.complaints


def test_ten_thousand_requests_and_their_baseline_stay_below_five_megabytes(long_page, many_requests):
  assert long_page.stat().st_size < 5e6
  text = long_page.read_text()
  assert f'{len(many_requests.timeline.spans):,} steps and transfers' in text and 'merged into slots' in text


def test_the_page_needs_nothing_from_elsewhere(few_requests):
  text = page.render_html(few_requests).replace(page._bundle(), '')
  assert not re.search(r'(src|href)\s*=\s*["\'](?!data:)', text)
  assert 'import(' not in text and 'url(' not in text and '@import' not in text


def test_the_page_has_the_figures_of_the_report(few_requests, colocated):
  text = page.render_html(few_requests, Beside(colocated, '2C tp1, 16 tokens', verdict=('Nobody wins.',)))
  cells = re.findall(r'<t[hd][^>]*>([^<]*)</t[hd]>', text)
  start = cells.index('TTFT')
  figures = (few_requests.ttft.mean_ms, few_requests.ttft.p50_ms, few_requests.ttft.p90_ms, few_requests.ttft.p99_ms)
  assert [float(cell) for cell in cells[start + 1 : start + 5]] == pytest.approx(figures, rel=0.01)
  assert cells[start + 5] == 'colocated'
  assert float(cells[start + 6]) == pytest.approx(colocated.ttft.mean_ms, rel=0.01)
  assert 'Uncalibrated estimate' in text and 'Nobody wins.' in text
  assert few_requests.handoff_account() in text
  assert '&#34;page_size&#34;: 4' in text


def test_a_run_that_served_nothing_says_so_and_draws_nothing(log, few_requests):
  log.turn(0.0)
  log.arrive('a')
  log.finish('a', 'error', 'request a needs 400 pages')
  for events in (log.events, []):
    text = page.render_html(Report.from_events(events, workers=few_requests.workers))
    assert 'Nothing was served.' in text and 'class="chart"' not in text
    assert ('Error: request a needs 400 pages' in text) is bool(events)
  beside = page.render_html(few_requests, Beside(Report.from_events([], workers=few_requests.workers), 'nothing'))
  assert beside.count('class="chart"') == 1 + 2 + 2 + 5


def test_the_page_says_what_the_prefix_cache_found(with_hits, colocated_with_hits, few_requests):
  text = page.render_html(with_hits.report)
  about = with_hits.report.hits_account()
  section = text[text.index('<section id="hits">') : text.index('<section id="latencies">')]
  assert about[0].upper() + about[1:] in section and section.count('class="chart"') == 1
  assert re.findall(r'</i>([^<]*)</li>', section) == ['prefill0', 'prefill1', 'decode0', 'asked for']
  assert f'began within {charts.interval_s([with_hits.report]):g} s' in section
  assert 'Pale are pages that nobody holds' in text
  both = page.render_html(with_hits.report, Beside(colocated_with_hits))
  section = both[both.index('<section id="hits">') : both.index('<section id="latencies">')]
  assert f'2P1D: {about}.' in section and f'colocated: {colocated_with_hits.hits_account()}.' in section
  one = page.render_html(with_hits.report, Beside(few_requests))
  assert one[one.index('<section id="hits">') : one.index('<section id="latencies">')].count('class="chart"') == 1


def test_without_hits_no_chart_shows_them(few_requests):
  for caches in (False, True):
    text = page.render_html(dataclasses.replace(few_requests, caches=caches))
    assert ('The prefix cache was on, and nothing was found in it.' in text) is caches
    assert ('Pale are pages' in text) is ('id="hits"' in text) is caches
    assert text.count('class="chart"') == 1 + 1 + 1 + 5


def test_the_verdict_over_rates_is_a_table(few_requests, colocated):
  beside = Beside(colocated, '2C', verdict=('1P1D wins.',), standings=[['req/s', '4'], ['TTFT p99', '1P1D']],
                  method=('Drawn anew.',), head=('system',), rows=(('2C',),), missing=('1C tp2', '4C tp1'))  # fmt: skip
  text = page.render_html(few_requests, beside)
  assert '<th scope="row">TTFT p99</th><td class="ours">1P1D</td>' in text
  assert text.index('1P1D wins.') < text.index('TTFT p99</th>') < text.index('Drawn anew.')
  assert 'Not possible: 1C tp2, 4C tp1' in text


def test_words_about_latencies_follow_the_run(few_requests, many_requests):
  slowest_ms = max(request.ttft_s for request in few_requests.timeline.requests) * 1e3
  few, many = (list(wording.sentences(report)) for report in (few_requests, many_requests))
  assert f'the slowest took {wording.short(slowest_ms)} ms; each further token' in few[0]
  assert f'one in a hundred took more than {wording.short(many_requests.ttft.p99_ms)} ms' in many[0]
  assert 'limit' not in page._about_latencies([few_requests])
  within = dataclasses.replace(few_requests, slo=SLO(ttft_ms=few_requests.ttft.p50_ms))
  assert 'p99; a dotted line is a limit.' in page._about_latencies([within])
  beyond = dataclasses.replace(few_requests, slo=SLO(ttft_ms=1e6))
  assert 'dotted' not in page._about_latencies([beyond])
  assert 'the limit of 1,000,000 ms on TTFT lies beyond the axis' in page._about_latencies([beyond])


def test_the_kicker_has_the_rate_and_a_date_as_people_write_it(few_requests):
  report = dataclasses.replace(few_requests, request_rate=4.0, date='20261103-090507')
  assert 'pdjax report · simulator · 4 req/s · 3 November 2026, 09:05' in page.render_html(report)
  assert 'pdjax report · simulator · today' in page.render_html(dataclasses.replace(few_requests, date='today'))


def test_every_chart_on_the_page_is_json_that_its_script_can_read(few_requests):
  text = page.render_html(few_requests)
  specs = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', text, re.DOTALL)
  assert all(isinstance(json.loads(spec), dict) for spec in specs)
  assert len(specs) == 9  # account, workers, pages, five latencies, the themes


def test_what_users_name_cannot_break_out_of_the_page(few_requests):
  evil = '</script><script>alert(1)</script>'
  named = dataclasses.replace(few_requests, model_id=evil, notes=(evil,), config={'checkpoint': evil})
  text = page.render_html(named, Beside(named, evil, name=evil, verdict=(evil,)))
  assert evil not in text and 'alert(1)' in text


def test_a_run_that_cannot_be_drawn_is_still_a_run(few_requests, tmp_path, monkeypatch):
  def broken(*arguments):
    raise RuntimeError('no fonts here')

  monkeypatch.setattr(page, '_bundle', broken)
  with pytest.warns(UserWarning, match='RuntimeError: no fonts here'):
    draw(few_requests, tmp_path)
  assert (tmp_path / 'trace.json').exists() and not (tmp_path / 'report.html').exists()
