"""Charts side by side in one picture."""

from pdjax.metrics import charts


def test_charts_side_by_side_share_a_row_and_a_legend(few_requests, colocated):
  parts = [charts.latency(few_requests, colocated, metric=metric) for metric in ('ttft', 'tpot')]
  whole = charts.side_by_side(*parts)
  assert whole.to_dict()['columns'] == 2
  picture = charts.picture(whole)
  assert picture.title == 'Time to first token; Time per output token'
  assert picture.width < 880
  assert picture.height < charts.picture(parts[0]).height + 20
