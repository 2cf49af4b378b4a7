"""A request without a seed gets one when it comes, which depends on the run's seed and its number alone."""

import math

from pdjax.serving.events import Arrived, Withdrawn
from pdjax.types.request import Request, SamplingParams
from pdjax.workload import ClosedLoop, Listed, Seeded


def request(name: str, arrival_s: float = 0.0, **sampling) -> Request:
  return Request(name, (1,), SamplingParams(**sampling), arrival_s)


def seeds(arrivals, run_seed: int) -> dict[str, int]:
  events = Seeded(arrivals, run_seed).due(math.inf, ())
  return {event.request.id: event.request.sampling.seed for event in events if isinstance(event, Arrived)}


def test_seeds_are_drawn_in_the_order_of_arrival():
  late_first = seeds(Listed([request('late', 1.0), request('early')]), 0)
  early_first = seeds(Listed([request('early'), request('late', 1.0)]), 0)
  assert late_first == early_first and len({*late_first.values()}) == 2
  assert late_first == {name: request(name).seeded(0, n).sampling.seed for n, name in enumerate(('early', 'late'))}


def test_a_seed_of_its_own_is_kept_and_counts_as_one_that_came():
  found = seeds(Listed([request('a'), request('b', seed=0), request('c')]), 7)
  assert found['b'] == 0
  assert found['c'] == request('c').seeded(7, 2).sampling.seed != found['a']


def test_another_run_draws_other_seeds():
  requests = [request(f'r{i}') for i in range(50)]
  drawn = {seed for run_seed in range(50) for seed in seeds(Listed(requests), run_seed).values()}
  assert len(drawn) == 2500 and all(0 <= seed < 2**63 for seed in drawn)


def test_samples_of_requests_without_a_seed_share_none():
  drawn = [sample.sampling.seed for number in range(50) for sample in request('a', n=20).seeded(3, number).samples()]
  assert len({*drawn}) == 1000
  assert [sample.sampling.seed for sample in request('a', n=3).samples()] == [None] * 3


def test_what_is_no_arrival_is_handed_on_and_so_is_every_question():
  class Source:
    closed = True

    def next_s(self):
      return 3.0

    def due(self, now_s, finished):
      return [Withdrawn('a'), Arrived(request('b'))]

    def output_len(self, name):
      return len(name)

  source = Seeded(Source(), 0)
  assert (source.closed, source.next_s(), source.output_len('abc')) == (True, 3.0, 3)
  assert source.due(0.0)[0] == Withdrawn('a')
  assert not Seeded(ClosedLoop([request('a')], 1), 0).closed
