"""The rows that a chart draws, read back from its specification."""

import csv
import io


def drawn_rows(chart, layer=0):
  """The rows that a layer of a chart draws."""
  spec = chart.to_dict()
  data = spec['layer'][layer].get('data') or spec['data']
  numbers = data['format'].get('parse') or {}
  rows = csv.DictReader(io.StringIO(spec['datasets'][data['name']]))
  return [{name: float(v) if name in numbers and v else v for name, v in row.items()} for row in rows]
