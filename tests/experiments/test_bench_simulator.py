"""The benchmark of the simulator: it counts what was served, and refuses to compare runs that served unlike things."""

import pytest

from experiments.simulated_speed import check_equal, serve_simulated, speed
from pdjax.config import ServingConfig
from pdjax.workload import Lognormal, WorkloadContext

REQUESTS = 6


@pytest.fixture(scope='module')
def answer() -> dict[str, float]:
  return serve_simulated(workers=2, rate=4.0, requests=REQUESTS)


def lengths(seed: int) -> list[int]:
  """Tokens that the config's workload generates, with the benchmark's distribution."""
  import dataclasses

  from configs.llama3_8b_simulated import get_config

  config: ServingConfig = get_config(num_requests=REQUESTS)
  workload = dataclasses.replace(
    config.workload, seed=seed, prompt=Lognormal(835, 0.6), output=Lognormal(167, 0.6)
  )  # fmt: skip
  arrivals = workload.arrivals(WorkloadContext(config.model.vocab_size, config.model.context_len, None))
  return [arrivals.output_len(f'request-{index}') for index in range(REQUESTS)]


def test_decode_tokens_are_all_but_the_first_of_each_request(answer):
  assert answer['finished'] == REQUESTS
  assert answer['tokens'] == sum(lengths(0)) - REQUESTS
  assert answer['cpu_s'] > 0 and speed(answer) == answer['tokens'] / answer['cpu_s'] / 1e6


def test_the_mean_batch_is_over_the_time_in_which_a_worker_decodes(answer):
  assert 1 <= answer['batch'] <= REQUESTS
  assert serve_simulated(workers=2, rate=1e-3, requests=3)['batch'] == 1


def test_clusters_that_are_served_one_after_another_have_requests_of_their_own(answer):
  both = serve_simulated(workers=2, rate=4.0, requests=REQUESTS, clusters=2)
  assert both['finished'] == 2 * REQUESTS
  assert both['tokens'] == sum(lengths(0)) + sum(lengths(1)) - 2 * REQUESTS


def test_runs_that_served_unlike_things_are_not_compared(answer):
  check_equal([answer, answer], REQUESTS)
  with pytest.raises(RuntimeError, match='expected 6 and the same in all'):
    check_equal([answer, answer | {'tokens': answer['tokens'] + 1}], REQUESTS)
  with pytest.raises(RuntimeError, match='expected 7'):
    check_equal([answer], REQUESTS + 1)
