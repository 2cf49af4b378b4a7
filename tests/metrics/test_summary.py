"""A summary that follows a run has what a reader of all its events finds, in memory that grows by numbers alone."""

import dataclasses
import gc
import itertools
import random

import numpy as np
import pytest

import pdjax
from pdjax.metrics import Report, Summary, draw, read_timeline
from pdjax.metrics import span_rows as spans_module
from pdjax.metrics.columns import Column
from pdjax.metrics.run_log import RunLog
from pdjax.metrics.token_times import Pieces, TokenTimes
from pdjax.serving.batch import NOBODY
from pdjax.serving.events import Arrived, Decoded, Delivered, Done, Event, Started, Turn
from pdjax.serving.orders import StepOrder, TransferOrder
from pdjax.workload import Given
from tests import tiny

SLO = pdjax.SLO(ttft_ms=40, tpot_ms=20)


def random_run(seed: int) -> pdjax.RunResult:
  """A few dozen requests of all kinds on a small cluster of some kind, simulated."""
  rng = random.Random(seed)
  time_s, requests = 0.0, []
  for number in range(rng.randint(5, 40)):
    time_s += rng.choice((0.0, rng.expovariate(50)))
    sampling = pdjax.SamplingParams(max_tokens=rng.randint(1, 14), n=rng.choice((1, 1, 1, 3)))
    slo = rng.choice((None, SLO))
    requests.append(pdjax.Request(f'r{number}', tiny.prompt(rng.randint(1, 25), number), sampling, time_s, slo))
  split = rng.choice(('1P1D', '1P2D', '2P1D'))
  num_prefill, num_decode = pdjax.types.parse_split(split)
  sizes = {'max_sequences': 4, 'max_step_tokens': 16, 'max_chunks': 4, 'num_pages': rng.choice((30, 60))}
  workers = pdjax.prefill_pool(num_prefill, **sizes) + pdjax.decode_pool(num_decode, **sizes)
  policy = pdjax.Disaggregated(max_prefill_tokens=16, decode_steps=rng.choice((1, 3)))
  if rng.random() < 0.4:
    workers, policy = pdjax.types.colocated_pool(num_decode, **sizes), pdjax.Colocated(token_budget=16)
  config = tiny.config(workload=Given(tuple(requests)))
  return pdjax.simulate(
    dataclasses.replace(config, workers=workers, policy=policy, pages_ahead=rng.choice(('all', 1)), slo=None)
  )


def delivered_times_s(events: list[Event]) -> dict[str, list[float]]:
  """The time of each token of each request, one result after another."""
  times_s: dict[str, list[float]] = {}
  for event in events:
    if isinstance(event, Arrived):
      times_s |= {sample.id: [] for sample in event.request.samples()}
    if isinstance(event, Delivered):
      for result in event.results:
        times_s[result.request] += event.times_s(len(result.tokens))
  return times_s


@pytest.mark.parametrize('seed', range(30))
def test_times_steps_and_figures_are_those_of_the_events(seed):
  result = random_run(seed)
  timeline = result.report.timeline
  assert timeline == read_timeline(result.events)
  expected = delivered_times_s(result.events)
  assert {one.id: list(one.token_times_s) for one in timeline.requests} == expected
  orders = {event.order.id: event.order for event in result.events if isinstance(event, Started)}
  told = [
    (event.order, event.began_s, event.ended_s)
    for event in result.events
    if isinstance(event, Done) and isinstance(orders[event.order], StepOrder | TransferOrder)
  ]
  assert [(span.order, span.began_s, span.ended_s) for span in timeline.spans] == told
  for span in timeline.spans:
    order = orders[span.order]
    assert span.requests == ((order.request,) if span.kind == 'transfer' else order.requests)


@pytest.mark.parametrize('seed', range(8))
def test_arrays_hold_what_the_requests_say_one_by_one(seed):
  requests = random_run(seed).report.timeline.requests
  done = [one for one in requests if one.completed]
  assert requests.completed.tolist() == [one.completed for one in requests]
  for name in ('ttft_s', 'tpot_s', 'e2el_s', 'queue_s', 'prefill_s', 'handoff_s'):
    found = [None if np.isnan(value) else value for value in getattr(requests, name).tolist()]
    assert found == [getattr(one, name) for one in requests], name
  gaps_s = [gap for one in done for gap in one.itls_s]
  assert requests.itls_s(np.flatnonzero(requests.completed)).tolist() == gaps_s
  assert requests.all_itls_s() == [list(one.itls_s) for one in requests]
  parts = [one.handoff for one in requests]
  for row, part in zip(requests.handoff_parts_s.tolist(), parts, strict=True):
    assert np.isnan(row).any() if part is None else row == list(dataclasses.astuple(part))
  assert requests.meets(SLO).tolist() == [one.meets(one.slo or SLO) for one in requests]
  assert requests.meets(None).tolist() == [one.meets(one.slo or pdjax.SLO()) for one in requests]
  stats = requests.distribution('itl').stats
  assert stats.p99_ms == np.percentile(np.array(gaps_s) * 1e3, 99) and stats.std_ms == (np.array(gaps_s) * 1e3).std()


def test_a_timeline_in_the_middle_is_that_of_the_events_so_far_and_stays():
  events = list(random_run(3).events)
  summary, kept = Summary(), []
  for number, event in enumerate(events):
    summary.follow(event)
    if number % 41 == 0:
      kept.append((number, summary.timeline()))
  for number, timeline in kept:
    assert timeline == read_timeline(events[: number + 1])
  assert any(one.finished_s is None for _, timeline in kept for one in timeline.requests)


@pytest.mark.parametrize('seed', range(4))
def test_a_run_whose_events_are_not_kept_has_the_same_files(seed, tmp_path):
  workload = pdjax.Poisson(requests_per_s=80, num_requests=60, prompt=pdjax.Uniform(2, 30), output=pdjax.Uniform(1, 12))
  config = tiny.config(workload=dataclasses.replace(workload, seed=seed), max_sequences=4)
  kept = pdjax.simulate(config, workdir=tmp_path / 'kept', keep_events=True)
  short = pdjax.simulate(config, workdir=tmp_path / 'short', keep_events=False)
  assert kept.events and short.events == () and kept.completions == short.completions
  dateless = [dataclasses.replace(result.report, date='') for result in (kept, short)]
  assert dateless[0].to_json() == dateless[1].to_json()
  for report, name in zip(dateless, ('kept', 'short'), strict=True):
    draw(report, tmp_path / name)
  for name in ('report.html', 'trace.json', 'metrics.prom', 'events.jsonl'):
    assert (tmp_path / 'kept' / name).read_bytes() == (tmp_path / 'short' / name).read_bytes(), name


# ---------------------------------------------------------------------------- memory


def followed(count: int) -> tuple[int, int, int]:
  """Objects that a summary of so many requests adds to the collector's, what is open in it, and bytes of its arrays."""
  workload = pdjax.Poisson(requests_per_s=40, num_requests=count, prompt=pdjax.Fixed(20), output=pdjax.Fixed(12))
  result = pdjax.simulate(tiny.config(workload=workload), keep_events=True)
  events = result.events
  gc.collect()
  before = len(gc.get_objects())
  summary = Summary()
  for event in events:
    summary.follow(event)
  nbytes = summary.timeline().nbytes
  gc.collect()
  return len(gc.get_objects()) - before, summary.num_open, nbytes


def test_what_a_summary_keeps_of_a_request_that_has_ended_are_numbers():
  (few, few_open, few_bytes), (many, many_open, many_bytes) = followed(200), followed(1000)
  assert few_open == many_open == 0
  assert many - few < 50  # a request more is no object more
  assert (many_bytes - few_bytes) / 800 < 2500  # its row, its steps, its transfers and the occupancy


def test_a_batch_that_stands_costs_its_times_once():
  batch = NOBODY.changed((), [Joined(f'r{i}', i) for i in range(50)])
  members = {name: Member() for name in batch.requests}
  times = TokenTimes()
  for step in range(100):
    decoded = Decoded(np.zeros((4, 50), np.int32), np.full(50, 4), ends_s=tuple(step + i / 4 for i in range(4)))
    times.deliver('w', Delivered(step + 1.0, 1, batch=batch, decoded=decoded), members.__getitem__)
  assert times.nbytes == 8 * 400
  for one in members.values():
    times.settle(one.pieces)
    assert len(one.pieces.flat) == 3 and times.times_s(one.pieces.flat).tolist() == [i / 4 for i in range(400)]


@dataclasses.dataclass
class Joined:
  request: str
  slot: int


class Member:
  def __init__(self):
    self.pieces = Pieces()


def test_those_that_leave_a_batch_and_come_again_elsewhere_have_their_tokens_in_order():
  members = {name: Member() for name in 'abc'}
  times, expected, now_s = TokenTimes(), {name: [] for name in 'abc'}, itertools.count(1)
  rng = random.Random(0)
  batches = dict.fromkeys('vw', NOBODY)
  for _ in range(300):
    worker = rng.choice('vw')
    if rng.random() < 0.3:
      others = batches['v' if worker == 'w' else 'w'].requests
      free = [name for name in 'abc' if name not in others]
      chosen = rng.sample(free, rng.randint(0, len(free)))
      batches[worker] = NOBODY.changed((), [Joined(name, slot) for slot, name in enumerate(chosen)])
    batch, time_s = batches[worker], float(next(now_s))
    counts = [rng.choice((0, 1, 2, 2, 2, 2)) for _ in batch.requests] if rng.random() < 0.5 else [2] * len(batch)
    late = frozenset(row for row in range(len(batch)) if rng.random() < 0.05)
    decoded = Decoded(np.zeros((2, len(batch)), np.int32), np.array(counts, np.int64))
    times.deliver(worker, Delivered(time_s, 1, batch=batch, decoded=decoded, late_rows=late), members.__getitem__)
    for row, (name, count) in enumerate(zip(batch.requests, counts, strict=True)):
      expected[name] += [] if row in late else [time_s] * count
  for name, one in members.items():
    times.settle(one.pieces)
    assert times.times_s(one.pieces.flat).tolist() == expected[name] and one.pieces.count == len(expected[name])


def test_parts_of_a_column_are_those_of_a_list_and_what_is_dropped_is_gone():
  rng = np.random.default_rng(0)
  column, values = Column(np.float64), []
  for size in rng.integers(0, 6000, 40).tolist():
    more = rng.random(size).tolist()
    column.extend(more)
    values += more
    for _ in range(5):
      start, stop = sorted(rng.integers(0, len(values) + 1, 2).tolist())
      assert column.part(start, stop).tolist() == values[start:stop]
  column.drop(50_000)
  assert len(column) == len(values) and column.nbytes < 8 * (len(values) - 30_000)
  assert column.part(50_000, 90_000).tolist() == values[50_000:90_000]
  assert column.array.tolist() == values[-len(column.array) :]


# ---------------------------------------------------------------------------- very long runs


def test_a_run_with_too_many_steps_has_no_trace_and_says_so(few_requests, tmp_path, monkeypatch):
  result = random_run(1)
  monkeypatch.setattr(spans_module, 'MOST_TRACED', 10)
  report = Report.from_events(result.events, workers=result.workers)
  draw(report, tmp_path)
  assert {path.name for path in tmp_path.iterdir()} == {'report.html'}
  assert any('There is no trace.json' in note for note in report.notes)
  assert not any('trace.json' in note for note in few_requests.notes)


def test_of_too_many_gaps_the_report_has_figures_alone(monkeypatch):
  result = random_run(1)
  monkeypatch.setattr('pdjax.metrics.request_rows.MOST_GAPS', 10)
  monkeypatch.setattr('pdjax.metrics.notes.MOST_GAPS', 10)
  report = Report.from_events(result.events, workers=result.workers)
  assert set(map(len, report.to_json()['itls'])) == {0} and report.itl == result.report.itl
  assert any('no single gaps between deltas' in note and '10' in note for note in report.notes)


def test_members_of_too_many_batches_are_left_out_and_no_figure_is(monkeypatch):
  whole = random_run(2)
  monkeypatch.setattr('pdjax.metrics.timeline.MOST_NAMED', 5)
  short = Report.from_events(whole.events, workers=whole.workers)
  assert whole.report.timeline.spans.are_named and not short.timeline.spans.are_named
  assert short.utilisation == whole.report.utilisation and short.ttft == whole.report.ttft
  assert [span.began_s for span in short.timeline.spans] == [span.began_s for span in whole.report.timeline.spans]


# ---------------------------------------------------------------------------- the log of a run


def test_events_are_kept_until_many_requests_have_come(monkeypatch):
  monkeypatch.setattr('pdjax.metrics.run_log.MOST_KEPT', 4)
  events = [Turn(0.0), *(Arrived(pdjax.Request(f'r{i}', (1,))) for i in range(5))]
  lengths = {}
  for keep, expected in itertools.product((None, True, False), (None, 2, 4)):
    log = RunLog(keep_events=keep, expected=expected)
    lengths[keep, expected] = []
    for event in events:
      log.append(event)
      lengths[keep, expected].append(len(log.events))
    assert len(log.timeline().requests) == 5
  grows = [1, 2, 3, 4, 5, 6]
  assert lengths[None, None] == lengths[None, 2] == [1, 2, 3, 4, 0, 0] and lengths[None, 4] == [0] * 6
  assert all(lengths[True, expected] == grows and lengths[False, expected] == [0] * 6 for expected in (None, 2, 4))


def test_an_event_that_makes_no_sense_ends_no_run_but_is_told_with_the_report():
  log = RunLog()
  log.append(Turn(0.0))
  log.append(Done(7, 0.0, 1.0))  # of no order
  log.append(Turn(1.0))
  assert len(log.events) == 3
  with pytest.raises(KeyError):
    log.timeline()


def test_an_interruption_in_the_middle_of_an_event_leaves_the_timeline_of_all_events(monkeypatch):
  events = random_run(5).events
  log, follow = RunLog(), Summary.follow
  place = next(number for number, event in enumerate(events) if isinstance(event, Delivered) and number > 60)

  def interrupted(summary, event):
    follow(summary, event)
    raise KeyboardInterrupt

  for event in events[:place]:
    log.append(event)
  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(Summary, 'follow', interrupted)
    log.append(events[place])
  assert log.timeline() == read_timeline(events[: place + 1])
