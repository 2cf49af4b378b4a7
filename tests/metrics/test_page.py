"""The page: what is on it, how large it is, and that a browser shows it without a complaint."""

import dataclasses
import json
import re

import pytest

from pdjax.metrics import Beside, OverRate, draw, page, save_html
from tests import browser

DRAWN = """new Promise(resolve => {
  const look = () => document.body.dataset.drawn ? resolve(Number(document.body.dataset.drawn)) : setTimeout(look, 20);
  look();
})"""


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
  shown = '[...document.querySelectorAll("[data-over-time]")].map(e => e.view.scale("x").domain())'
  before = window.evaluate(shown)
  assert len(before) == 4 and all(domain == before[0] for domain in before)
  window.evaluate('document.querySelector("[data-zoom]").click()')
  window.evaluate('new Promise(resolve => setTimeout(resolve, 200))')
  after = window.evaluate(shown)
  assert all(domain == after[0] for domain in after)
  assert after[0][1] - after[0][0] == pytest.approx((before[0][1] - before[0][0]) / 2)
  assert window.complaints == []


def test_ten_thousand_requests_and_their_baseline_stay_below_five_megabytes(long_page, many_requests):
  assert long_page.stat().st_size < 5e6
  text = long_page.read_text()
  assert f'{len(many_requests.timeline.spans):,} passes and transfers' in text and 'merged into slots' in text


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
