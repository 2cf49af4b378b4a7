"""All requests of a workload, for tests of any of them."""

from pdjax.serving.events import Finished


def all_requests(workload, context):
  """Every request, each finished at once with as many tokens as it really has."""
  arrivals = workload.arrivals(context)
  now_s, requests, ends = 0.0, [], []
  while not arrivals.closed or ends:
    arrived = [event.request for event in arrivals.due(now_s, ends)]
    requests += arrived
    now_s = max(now_s, min(arrivals.next_s(), now_s + 1.0))
    ends = [Finished(now_s, request.id, 'length', (5,) * (arrivals.output_len(request.id) or 1)) for request in arrived]
    if not arrived and not arrivals.closed:
      now_s = arrivals.next_s()
  return requests, arrivals
