"""Figures over the rate, and where their points lie."""

import re

import numpy as np
import pytest
import vl_convert

from pdjax.metrics import charts
from tests.metrics.charts.drawn import drawn_rows


def test_figures_that_are_missing_or_zero_are_left_out_of_a_logarithmic_axis():
  curves = {'1P1D': [(1.0, 5.0), (2.0, None), (4.0, 0.0)], 'colocated': [(1.0, 7.0), (2.0, 8.0), (4.0, 9.0)]}
  assert len(drawn_rows(charts.over_rate(curves, 'tail', 'ms', log=True))) == 4
  assert len(drawn_rows(charts.over_rate(curves, 'goodput', 'requests/s'))) == 5
  curves = {'1P1D': list(zip([1.0, 2.0, 4.0, 8.0], [np.nan, np.inf, -1.0, 2.0], strict=True))}
  assert [row['value'] for row in drawn_rows(charts.over_rate(curves, 'tail', 'ms', log=True))] == [2]
  assert [row['value'] for row in drawn_rows(charts.over_rate(curves, 'tail', 'ms'))] == [-1, 2]


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


def test_what_was_offered_is_a_thin_line():
  curves = {'1P1D': [(1.0, 0.5), (4.0, 2.0)]}
  assert [(row['rate'], row['value']) for row in drawn_rows(charts.over_rate(curves, 'good', 'req/s', ideal=True))] == [
    (1, 1),
    (4, 4),
  ]
