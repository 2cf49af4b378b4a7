"""Every way of serving gives the tokens of an independent implementation.

The whole product of ways and page sizes: `python -m experiments.check_tokens`.
"""

import dataclasses

import pytest

from configs import smollm2_cpu
from experiments.check_tokens import plain_golden, serve_golden
from pdjax.launch import run
from pdjax.types import Request, SamplingParams
from pdjax.workload import Given
from tests.compiling import optimised


@pytest.mark.slow
def test_a_plain_loop_gives_the_golden_tokens():
  assert plain_golden() == {}


@pytest.mark.parametrize(
  ('way', 'page_size'),
  [
    pytest.param('colocated', 16, marks=pytest.mark.slow),
    pytest.param('1P1D tp1→tp3', 16, marks=pytest.mark.slow),
    pytest.param('1P1D tp3→tp1', 1, marks=pytest.mark.slow),
    pytest.param('2P2D', 64, marks=pytest.mark.slow),
    pytest.param('1P2D in turns', 16, marks=pytest.mark.slow),
  ],
)
def test_serving_gives_the_golden_tokens(way, page_size):
  with optimised():
    assert serve_golden(way, page_size) == {}


@pytest.mark.slow
def test_a_prompt_as_long_as_the_context_is_served_in_chunks_and_one_token_longer_is_refused():
  config = smollm2_cpu.get_config()
  prompts = [tuple(3 + i * 7919 % 40_000 for i in range(length)) for length in (8192, 8190, 8193)]
  sampling = SamplingParams(max_tokens=5, ignore_eos=True)
  requests = tuple(Request(f'r{i}', prompt, sampling) for i, prompt in enumerate(prompts))
  with optimised():
    result = run(dataclasses.replace(config, workload=Given(requests)))
  assert [(len(one.token_ids), one.finish_reason) for one in result.completions] == [
    (1, 'length'), (3, 'length'), (0, 'rejected'),
  ]  # fmt: skip
  assert '8193 tokens, but the context' in (result.completions[2].error or '')
