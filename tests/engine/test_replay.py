"""A recorded run of the engine, reproduced by the simulator's own heap and page accounting."""

import dataclasses

import numpy as np
import pytest

from pdjax.policies import Disaggregated
from pdjax.serving import PolicyError, StuckError
from pdjax.serving.events import Done, Event, Turn
from pdjax.serving.loop import Arrivals, serve
from pdjax.serving.orders import StepOrder
from pdjax.simulator import Replay, started
from pdjax.types import Request, SamplingParams
from pdjax.workload.arrivals import Listed
from tests.engine.cluster import Cluster, Served
from tests.tiny import prompt


def some_requests() -> list[Request]:
  """Twelve, a few at once and a few later, more than there are slots."""
  lengths = (1, 3, 4, 17, 40, 9, 16, 5, 33, 2, 8, 20)
  return [
    Request(
      f'r{i}', prompt(length, seed=i), SamplingParams(max_tokens=3 + i % 5, seed=i, temperature=i % 2), 0.003 * (i // 4)
    )
    for i, length in enumerate(lengths)
  ]


def replay(cluster: Cluster, served: Served, record: tuple[Event, ...], num_pages: int | None = None):
  """The events of the loop over a record, from fresh arrivals and a fresh state."""
  return replay_from(cluster, served, record, Listed(served.requests), num_pages)


def replay_from(
  cluster: Cluster, served: Served, record: tuple[Event, ...], arrivals: Arrivals, num_pages: int | None = None
):
  """The same, from arrivals that are no list."""
  specs = [dataclasses.replace(spec, num_pages=num_pages or spec.num_pages) for spec in cluster.specs]
  backend = Replay(cluster.model, [*specs, *cluster.holders], record)
  state = cluster.empty_state(num_pages)
  for name, incarnation in served.incarnations.items():
    state.workers[name].incarnation = incarnation
  return tuple(serve(arrivals, served.policy, backend, state))


def faithful(cluster: Cluster, served: Served, record: tuple[Event, ...]) -> bool:
  """Whether a record is that of a run: the loop makes the same of it again."""
  try:
    return replay(cluster, served, record) == record
  except (ValueError, AssertionError, PolicyError, StuckError, KeyError, IndexError):
    return False


@pytest.fixture(scope='module')
def disaggregated_run(two_and_two) -> Served:
  return two_and_two.serve(some_requests())


@pytest.fixture(scope='module')
def colocated_run(colocated_pair) -> Served:
  return colocated_pair.serve(some_requests())


def test_a_disaggregated_run_is_reproduced_event_for_event(two_and_two, disaggregated_run):
  again = replay(two_and_two, disaggregated_run, disaggregated_run.events)
  assert started(again) == started(disaggregated_run.events)  # every turn, action and page number
  assert again == disaggregated_run.events


def test_a_colocated_run_is_reproduced_event_for_event(colocated_pair, colocated_run):
  assert replay(colocated_pair, colocated_run, colocated_run.events) == colocated_run.events


def test_a_run_with_fused_decode_steps_is_reproduced(one_and_one):
  served = one_and_one.serve(some_requests(), Disaggregated(max_prefill_tokens=9, decode_steps=4))
  assert replay(one_and_one, served, served.events) == served.events


def ends(record: tuple[Event, ...], kind: type) -> list[int]:
  """The indices in a record at which orders of a kind end."""
  orders = {event.order.id: event.order for event in record if hasattr(event, 'order') and hasattr(event.order, 'id')}
  return [i for i, event in enumerate(record) if isinstance(event, Done) and isinstance(orders[event.order], kind)]


def test_two_ends_swapped_are_another_run(two_and_two, disaggregated_run):
  record = disaggregated_run.events
  assert faithful(two_and_two, disaggregated_run, record)
  steps = ends(record, StepOrder)
  for a, b in ((steps[0], steps[-1]), (steps[2], steps[len(steps) // 2]), (steps[-3], steps[-1])):
    swapped = list(record)
    swapped[a] = dataclasses.replace(record[a], ended_s=record[b].ended_s)
    swapped[b] = dataclasses.replace(record[b], ended_s=record[a].ended_s)
    assert not faithful(two_and_two, disaggregated_run, tuple(swapped))


def test_one_token_less_is_another_run(two_and_two, disaggregated_run):
  record = disaggregated_run.events
  for index in [i for i in ends(record, StepOrder) if record[i].results or record[i].decoded][::5]:
    done, decoded = record[index], record[index].decoded
    if decoded is None:
      less = dataclasses.replace(done, results=done.results[1:])
    else:
      row = int(decoded.counts.argmax())
      counts = np.array([count - (place == row) for place, count in enumerate(decoded.counts)])
      less = dataclasses.replace(done, decoded=dataclasses.replace(decoded, counts=counts))
    changed = [*record[:index], less, *record[index + 1 :]]
    assert not faithful(two_and_two, disaggregated_run, tuple(changed))


def test_a_turn_at_another_time_is_another_run(two_and_two, disaggregated_run):
  record = disaggregated_run.events
  turns = [i for i, event in enumerate(record) if isinstance(event, Turn)]
  index = turns[len(turns) // 2]
  early = Turn(record[turns[len(turns) // 2 - 1]].now_s)
  assert not faithful(two_and_two, disaggregated_run, (*record[:index], early, *record[index + 1 :]))


def test_a_smaller_pool_is_another_run(two_and_two, disaggregated_run):
  record = disaggregated_run.events
  try:
    again = replay(two_and_two, disaggregated_run, record, num_pages=13)  # pages are used again sooner
  except (ValueError, AssertionError, PolicyError, StuckError):
    return
  assert again != record


def test_a_record_that_stops_early_says_so(two_and_two, disaggregated_run):
  record = disaggregated_run.events
  with pytest.raises(ValueError, match='the record ends after'):
    replay(two_and_two, disaggregated_run, record[: len(record) // 2])
