"""Ready requests are a workload like any other."""

import math

from pdjax.types.request import Request
from pdjax.workload.workload import Given, WorkloadContext


def test_given_requests_come_as_they_are():
  requests = [Request('b', (1,), arrival_s=2.0), Request('a', (2,), arrival_s=0.0)]
  workload = Given(requests)
  arrivals = workload.arrivals(WorkloadContext(vocab_size=10, context_len=100))
  assert [event.request for event in arrivals.due(2.0, [])] == [requests[1], requests[0]]
  assert arrivals.output_len('a') is None
  assert (workload.num_requests, workload.request_rate) == (2, 0.5)


def test_given_requests_that_come_at_once_have_no_rate_to_name():
  assert Given((Request('a', (1,)), Request('b', (1,)))).request_rate == math.inf
  assert Given(()).num_requests == 0
