"""Every way of serving gives the tokens of an independent implementation.

The whole product of ways and page sizes: `python -m experiments.check_tokens`.
"""

import pytest

from experiments.check_tokens import plain_golden, serve_golden


def test_a_plain_loop_gives_the_golden_tokens():
  assert plain_golden() == {}


@pytest.mark.parametrize(
  ('way', 'page_size'),
  [('colocated', 16), ('1P1D tp1→tp3', 1), ('1P1D tp3→tp1', 16), ('2P2D', 64)],
)
def test_serving_gives_the_golden_tokens(way, page_size):
  assert serve_golden(way, page_size) == {}
