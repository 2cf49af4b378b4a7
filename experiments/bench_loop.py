r"""The cost of a turn of the host loop: the policy, the state and the log, with a backend that does nothing.

python -m experiments.bench_loop
python -m experiments.bench_loop --batch=128 --json=loop.json
python -m experiments.bench_loop --batch=256 --beside=../before

Every decode worker holds `--batch` sequences. A turn ends the oldest step of every worker, applies its tokens, asks the
policy, and hands the next step over: what a device would wait for if it were infinitely fast. Events are kept, and
somebody reads all that is delivered. With `--beside` another checkout's `turn_seconds` of one worker of each role is
measured in turns with this one's, each with its own backend, in processes of their own.
"""

import collections
import statistics
import tempfile
import time
from collections.abc import Sequence

import numpy as np
from absl import app, flags
from rich.console import Console
from rich.table import Table

from experiments.rows import row, save_rows
from experiments.two_trees import HERE, in_turns, open_tree
from pdjax.metrics import EventLog
from pdjax.policies import Colocated, Disaggregated
from pdjax.serving import ClusterState, Policy, serve
from pdjax.serving.events import Decoded, Delivered, Done, Event, Result, Turn
from pdjax.serving.orders import Order, StepOrder
from pdjax.types import ModelSpec, Request, SamplingParams, WorkerSpec, colocated_pool, decode_pool, prefill_pool
from pdjax.workload import Listed, RandomTokens

_BATCH = flags.DEFINE_integer('batch', 32, 'Sequences that decode at once on each worker.', lower_bound=1)
_STEPS = flags.DEFINE_integer('steps', 500, 'Tokens of each request, so about as many turns.', lower_bound=10)
_REPEATS = flags.DEFINE_integer('repeats', 5, 'Runs of which the median counts.', lower_bound=1)
_BESIDE = flags.DEFINE_string('beside', None, 'The root of another checkout, measured in turns with this one.')
_JSON = flags.DEFINE_string('json', None, 'Write rows of name, value, unit to this file.')

_TOKEN = 7


class NullBackend:
  """Ends every order at once; a step brings each of its sequences as many tokens as it was asked for."""

  def __init__(self):
    self._orders: list[Order] = []
    self._now_s = 0.0
    self._over: set[int] = set()  # standing orders that others came behind

  def submit(self, orders: Sequence[Order]) -> None:
    """Keep the orders for the next turn."""
    for order in orders:
      if isinstance(order, StepOrder):  # one that stands there ends with the step that is with its worker
        self._over |= {one.id for one in self._orders if isinstance(one, StepOrder) and one.worker == order.worker}
      self._orders.append(order)

  def wait(self, until_s: float) -> tuple[float, list[Event]]:
    """End the oldest step of every worker, and all else."""
    began_s, self._now_s = self._now_s, self._now_s + 1e-3
    events: list[Event] = []
    later: list[Order] = []
    busy = set()
    for order in self._orders:
      if isinstance(order, StepOrder) and order.worker in busy:
        later.append(order)
        continue
      if isinstance(order, StepOrder):
        busy.add(order.worker)
        if order.standing and order.id not in self._over:
          later.append(order)
      events.append(self._done(order, began_s))
    self._orders = later
    return self._now_s, events

  def _done(self, order: Order, began_s: float) -> Done:
    if not isinstance(order, StepOrder):
      return Done(order.id, began_s, self._now_s)
    firsts = tuple(Result(chunk.request.id, (_TOKEN,)) for chunk in order.chunks if chunk.is_last)
    decoded, batch = None, len(order.batch)
    if order.decodes:
      decoded = Decoded(np.full((order.steps, batch), _TOKEN, np.int32), np.full(batch, order.steps, np.int64))
    to_come = None if order.standing and order.id not in self._over else 0
    return Done(order.id, began_s, self._now_s, firsts, decoded, to_come)


def read_delivered(event: Delivered, read: collections.Counter[str]) -> None:
  """Count the tokens that each request got, as a reader of a stream must look at them."""
  for result in event.firsts:
    read[result.request] += len(result.tokens)
  if event.decoded is not None:
    for name, tokens, count in zip(
      event.batch.requests, event.decoded.tokens.T.tolist(), event.decoded.counts.tolist(), strict=True
    ):
      read[name] += len(tokens[:count])


def turn_seconds(
  policy: Policy, workers: tuple[WorkerSpec, ...], batch: int, steps: int, log_path: str | None = None
) -> list[float]:
  """Seconds of every turn in which all sequences decode, a reader included; with a path the log is in a file too."""
  model = ModelSpec.smollm2_135m()
  decoders = sum(worker.role.decodes for worker in workers)
  sampling = SamplingParams(max_tokens=16 * steps)
  requests = [Request(f'r{i}', RandomTokens(64, 1000, i), sampling) for i in range(batch * decoders)]
  state = ClusterState(model, workers, page_size=16)
  seconds = []
  log = EventLog(log_path)
  turns = 0
  read: collections.Counter[str] = collections.Counter()
  begin = time.perf_counter()
  for event in serve(Listed(requests), policy, NullBackend(), state):
    log.append(event)
    if isinstance(event, Delivered):
      read_delivered(event, read)
    elif isinstance(event, Turn):
      now = time.perf_counter()
      if all(len(worker.decoding) == batch for worker in state.view.decode_workers):
        seconds.append(now - begin)
        turns += 1
      begin = now
      if turns >= steps:
        break
  log.close()
  return seconds


def one_and_one_seconds(batch: int, steps: int) -> list[float]:
  """A tree's own `turn_seconds` of one worker of each role; it names nothing of this file."""
  from experiments.bench_loop import turn_seconds
  from pdjax.policies import Disaggregated
  from pdjax.types import decode_pool, prefill_pool

  sizes = {'num_pages': 512 * batch, 'max_sequences': batch}
  return turn_seconds(Disaggregated(), prefill_pool(1, **sizes) + decode_pool(1, **sizes), batch, steps)


def p99(seconds: list[float]) -> float:
  """The value that one in a hundred reaches."""
  return sorted(seconds)[int(0.99 * len(seconds))]


def beside(path: str) -> None:
  """Measure one worker of each role in turns with another tree; print, and save rows."""
  try:
    other = open_tree(path)
  except ValueError as error:
    raise app.UsageError(f'--beside: {error}') from error
  batch = _BATCH.value
  turns = in_turns([HERE, other], _REPEATS.value, one_and_one_seconds, batch=batch, steps=_STEPS.value)
  table = Table(title=f'a turn of the host loop, 1P1D, {batch} sequences, medians of {len(turns)} runs in turns')
  for column in ('ms', 'this tree', 'the other', 'ratio'):
    table.add_column(column, justify='left' if column == 'ms' else 'right')
  rows = []
  for name, figure in (('mean', statistics.fmean), ('median', statistics.median), ('p99', p99)):
    ours, theirs = (statistics.median(figure(turn[tree]) for turn in turns) * 1e3 for tree in (0, 1))
    ratio = statistics.median(figure(here) / figure(there) for here, there in turns)
    table.add_row(name, f'{ours:.3f}', f'{theirs:.3f}', f'{ratio:.2f}')
    rows.append(row(f'{name} turn, 1P1D, batch {batch}', ours, 'ms', peer='the other tree', peer_value=theirs))
    rows.append(row(f'median of the ratios, {name} turn, 1P1D, batch {batch}', ratio, 'times'))
  tails = [statistics.median(p99(turn[tree]) / statistics.median(turn[tree]) for turn in turns) for tree in (0, 1)]
  table.add_row('p99 / median', *(f'{tail:.2f}' for tail in tails), '')
  rows.append(row(f'p99 of turns by their median, 1P1D, batch {batch}', tails[0], 'times'))
  Console().print(table)
  save_rows(_JSON.value, rows)


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments {argv[1:]}; options begin with --.')
  if _BESIDE.value is not None:
    beside(_BESIDE.value)
    return
  batch = _BATCH.value
  sizes = {'num_pages': 512 * batch, 'max_sequences': batch}
  one_and_one = prefill_pool(1, **sizes) + decode_pool(1, **sizes)
  cases: dict[str, tuple[Policy, tuple[WorkerSpec, ...]]] = {
    '1P1D': (Disaggregated(), one_and_one),
    '1P1D, log in a file': (Disaggregated(), one_and_one),
    '1P1D, 8 steps fused': (Disaggregated(decode_steps=8), one_and_one),
    '4P4D': (Disaggregated(), prefill_pool(4, **sizes) + decode_pool(4, **sizes)),
    '1 colocated': (Colocated(), colocated_pool(1, **sizes)),
  }
  table = Table(title=f'a turn of the host loop, {batch} sequences on each decode worker')
  for column in ('cluster', 'median ms', 'p99 ms', 'µs a sequence'):
    table.add_column(column, justify='left' if column == 'cluster' else 'right')
  rows = []
  for name, (policy, workers) in cases.items():
    with tempfile.NamedTemporaryFile() as file:
      path = file.name if 'file' in name else None
      runs = [turn_seconds(policy, workers, batch, _STEPS.value, path) for _ in range(_REPEATS.value)]
    median_s = statistics.median(statistics.median(run) for run in runs)
    p99_s = statistics.median(p99(run) for run in runs)
    sequences = batch * sum(worker.role.decodes for worker in workers)
    table.add_row(name, f'{median_s * 1e3:.3f}', f'{p99_s * 1e3:.3f}', f'{median_s / sequences * 1e6:.2f}')
    rows.append(row(f'turn, {name}, batch {batch}', median_s * 1e3, 'ms'))
  Console().print(table)
  save_rows(_JSON.value, rows)


if __name__ == '__main__':
  app.run(main)
