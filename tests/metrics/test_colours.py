"""The colours of data stand out on a light and a dark page."""

import numpy as np
import pytest

from pdjax.metrics import colours


def _luminance(colour: str) -> float:
  parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
  linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
  return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


@pytest.mark.parametrize('paper', [colours.LIGHT['paper'], colours.DARK['paper']])
def test_every_data_colour_stands_out_on_both_papers(paper):
  for colour in {*colours.PHASES.values(), *colours.PARTS.values(), *colours.SYSTEMS, colours.BASELINE}:
    dark, light = sorted((_luminance(colour), _luminance(paper)))
    assert (light + 0.05) / (dark + 0.05) >= 3, colour
