"""Colours of every chart: one for each phase, in all charts alike, and the rest of a light and a dark page.

Data colours are the same on both pages: each has a contrast of at least 3 to 1 against white and against the dark
paper, and they stay apart for colour-blind readers (after Okabe and Ito, 2008).
"""

from typing import Any

PHASES = {'prefill': '#2f81d0', 'decode': '#d97706', 'fused': '#c4609c', 'transfer': '#0f9d76', 'copy': '#7f8b1f'}
PARTS = {
  'queue': '#8b949e',
  'prefill': PHASES['prefill'],
  'wait': '#8b949e',
  'wire': PHASES['transfer'],
  'admit': '#6e7781',
  'step': PHASES['decode'],
}
WAITING = '#8b949e'
BASELINE = '#8b949e'
SYSTEMS = ('#7a62d3', '#168aad', '#b5542a', '#7f8b1f', '#c4609c', '#0f9d76')

FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'
LIGHT = {'paper': '#ffffff', 'ink': '#1f2328', 'soft': '#57606a', 'line': '#e4e8ec', 'axis': '#c4cad1'}
DARK = {'paper': '#0f1419', 'ink': '#e8ecf0', 'soft': '#9aa4af', 'line': '#242b33', 'axis': '#414a54'}


def vega_config(theme: dict[str, str]) -> dict[str, Any]:
  """The Vega config that draws axes, text and marks on the paper of `LIGHT` or `DARK`."""
  return {
    'background': theme['paper'],
    'font': FONT,
    'padding': 2,
    'view': {'stroke': None},
    'axis': {
      'domainColor': theme['axis'], 'tickColor': theme['axis'], 'gridColor': theme['line'],
      'labelColor': theme['soft'], 'titleColor': theme['soft'],
      'labelFontSize': 12, 'titleFontSize': 12, 'titleFontWeight': 'normal', 'titlePadding': 8, 'labelPadding': 5,
      'tickSize': 4, 'labelFlush': False,
    },
    'legend': {
      'labelColor': theme['soft'], 'titleColor': theme['soft'], 'labelFontSize': 12, 'symbolType': 'square',
      'orient': 'top', 'title': None, 'offset': 10,
    },
    'title': {
      'color': theme['ink'], 'subtitleColor': theme['soft'], 'fontSize': 15, 'subtitleFontSize': 12,
      'fontWeight': 600, 'anchor': 'start', 'frame': 'group', 'offset': 12, 'subtitlePadding': 5,
    },
    'text': {'color': theme['ink'], 'fontSize': 12},
    'rule': {'color': theme['soft']},
    'point': {'stroke': theme['paper']},
  }  # fmt: skip
