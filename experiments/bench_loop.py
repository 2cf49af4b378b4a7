r"""The cost of a turn of the host loop: the policy, the state and the log, with a backend that does nothing.

python -m experiments.bench_loop
python -m experiments.bench_loop --batch=128 --json=loop.json
python -m experiments.bench_loop --batch=256 --beside=../before
python -m experiments.bench_loop --batch=256 --cached_blocks=100000

Every decode worker holds `--batch` sequences. A turn ends the oldest step of every worker, applies its tokens, asks the
policy, and hands the next step over: what a device would wait for if it were infinitely fast. Events are kept, and
somebody reads all that is delivered. With `--beside` another checkout's `turn_seconds` of one worker of each role is
measured in turns with this one's, each with its own backend, in processes of their own.

With `--cached_blocks` requests also come and go: each has 65 tokens and gets 512, so that a batch of 256 fills 4 blocks
of 64 tokens a turn and every other turn one ends and another begins. Without a prefix cache, with one that begins
empty, and with one that holds so many blocks on either worker and gives the oldest of them away: these take turns.
"""

import collections
import dataclasses
import gc
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
from pdjax.serving.block_keys import KEY_BYTES
from pdjax.serving.events import BlockStored, Decoded, Delivered, Done, Ended, Event, Result, Turn
from pdjax.serving.orders import Order, StepOrder
from pdjax.serving.requests import RequestState
from pdjax.types import (
  ModelSpec,
  PrefixCache,
  Request,
  SamplingParams,
  WorkerSpec,
  colocated_pool,
  decode_pool,
  prefill_pool,
)
from pdjax.workload import ClosedLoop, Listed, RandomTokens

_BATCH = flags.DEFINE_integer('batch', 32, 'Sequences that decode at once on each worker.', lower_bound=1)
_STEPS = flags.DEFINE_integer('steps', 500, 'Tokens of each request, so about as many turns.', lower_bound=10)
_REPEATS = flags.DEFINE_integer('repeats', 5, 'Runs of which the median counts.', lower_bound=1)
_BESIDE = flags.DEFINE_string('beside', None, 'The root of another checkout, measured in turns with this one.')
_CACHED = flags.DEFINE_integer(
  'cached_blocks', None, 'Measure turns beside so many cached blocks, and beside none, instead.', lower_bound=0
)
_JSON = flags.DEFINE_string('json', None, 'Write rows of name, value, unit to this file.')

_TOKEN = 7
_BLOCK = 64  # tokens of a block, and of a page
_PROMPT, _OUTPUT = 65, 512  # tokens of a request that comes and goes


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
      done = self._done(order, began_s)
      events.append(done)
      if done.to_come is None:
        later.append(order)
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


class EndingBackend(NullBackend):
  """Ends sequences too, each when it has got its tokens; of one worker that decodes."""

  def __init__(self, num_slots: int):
    super().__init__()
    self._left = np.zeros(num_slots, np.int64)
    self._begun = -1  # the last step that took in those that join

  def _done(self, order: Order, began_s: float) -> Done:
    done = super()._done(order, began_s)
    if done.decoded is None or not isinstance(order, StepOrder):
      return done
    if order.id > self._begun:
      self._begun = order.id
      for join in order.joins:
        self._left[join.slot] = join.left
    slots = np.array(order.batch.slots)
    counts = np.minimum(self._left[slots], done.decoded.counts)
    self._left[slots] -= counts
    rows = np.flatnonzero((counts > 0) & (self._left[slots] == 0)).tolist()
    decoded = dataclasses.replace(
      done.decoded, counts=counts, ended=tuple(Ended(row, 'length') for row in rows)
    )  # fmt: skip
    return dataclasses.replace(done, decoded=decoded, to_come=0 if rows else done.to_come)


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


def cache_blocks(state: ClusterState, count: int) -> None:
  """Let every worker hold as many blocks, which prompts of a thousand left there, and have no other free page."""
  books = state.books
  prefixes = books.prefixes
  assert prefixes is not None
  left = count
  while left:
    blocks = min(left, 1000)
    prompt = np.random.default_rng(left).integers(1000, 49_000, _BLOCK * blocks, dtype=np.int32).tolist()
    entry = RequestState(Request(f'cached-{left}', tuple(prompt), SamplingParams(max_tokens=1)), limit=1)
    for worker in books.workers.values():
      entry.worker = worker.name
      books.reserve(entry, worker, decodes=False)
      prefixes.note_computed(entry, worker.name, worker.name, entry.prompt_len)
      books.leave(entry, worker.name)
    left -= blocks
  books.told.clear()


def coming_and_going_seconds(batch: int, steps: int, cached: int | None, room: int) -> tuple[float, float]:
  """The mean turn in which requests decode, end and begin, in seconds, and the blocks that a turn brings.

  Args:
    batch: Requests at once.
    steps: Turns that are measured, behind those in which the first requests begin.
    cached: Blocks that each worker holds; None is without a cache.
    room: Blocks that each worker has pages for beside those of its requests.
  """
  live = batch * -(-(_PROMPT + 2 * _OUTPUT) // _BLOCK)
  sizes = {'num_pages': live + room, 'max_sequences': batch}
  cache = None if cached is None else PrefixCache(block_tokens=_BLOCK)
  workers = prefill_pool(1, **sizes) + decode_pool(1, **sizes)
  state = ClusterState(ModelSpec.smollm2_135m(), workers, _BLOCK, prefix_cache=cache)
  if cached:
    cache_blocks(state, live + cached)
  begins = _OUTPUT // 2  # by then all have begun
  lens = [begins + index * _OUTPUT // batch for index in range(batch)]  # of the first, so that none end together
  lens += [_OUTPUT] * (-(-(begins + steps) // _OUTPUT) * batch + batch)
  requests = [
    Request(f'r{i}', tuple(RandomTokens(_PROMPT, 1000, i)), SamplingParams(max_tokens=length, ignore_eos=True))
    for i, length in enumerate(lens)
  ]
  log, read, turns, began, blocks = EventLog(None), collections.Counter[str](), 0, 0.0, 0
  gc.collect()
  for event in serve(ClosedLoop(requests, batch), Disaggregated(), EndingBackend(batch), state):
    log.append(event)
    if isinstance(event, Delivered):
      read_delivered(event, read)
    elif isinstance(event, BlockStored) and turns > begins:
      blocks += len(event.keys) // KEY_BYTES
    elif isinstance(event, Turn):
      turns += 1
      if turns == begins:
        began = time.perf_counter()
      elif turns == begins + steps:
        break
  assert turns == begins + steps, 'all requests have ended'
  return (time.perf_counter() - began) / steps, blocks / steps


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


def beside_cached(num_blocks: int) -> None:
  """Measure turns without a cache, with an empty one, and beside so many cached blocks; print, and save rows."""
  batch, steps = _BATCH.value, _STEPS.value
  cases: dict[str, int | None] = {'no cache': None, 'none cached': 0, f'{num_blocks:,} cached': num_blocks}
  seconds: dict[str, list[float]] = {name: [] for name in cases}
  for number in range(_REPEATS.value):
    for name in list(cases)[:: 1 if number % 2 == 0 else -1]:
      mean_s, blocks = coming_and_going_seconds(batch, steps, cases[name], num_blocks)
      seconds[name].append(mean_s)
  without, empty, full = seconds.values()
  table = Table(title=f'a turn of the host loop, 1P1D, {batch} sequences, means, medians of {len(full)} runs in turns')
  for column in ('blocks', 'µs a turn', 'more than without a cache', 'more than with none cached'):
    table.add_column(column, justify='left' if column == 'blocks' else 'right')
  rows = []
  for name, found in seconds.items():
    cells = [f'{1e6 * statistics.median(found):.1f}']
    for other in (without, empty):
      more = sorted(1e6 * (ours - theirs) for ours, theirs in zip(found, other, strict=True))
      cells.append(f'{statistics.median(more):.1f} ({more[0]:.1f} to {more[-1]:.1f})')
    table.add_row(name, *cells)
    rows.append(row(f'mean turn, 1P1D, batch {batch}, {name}', 1e6 * statistics.median(found), 'µs'))
  for name, other in (('no cache', without), ('none cached', empty)):
    more_s = statistics.median(ours - theirs for ours, theirs in zip(full, other, strict=True))
    rows.append(row(f'more a turn with {num_blocks:,} cached than with {name}, batch {batch}', 1e6 * more_s, 'µs'))
  console = Console()
  console.print(table)
  console.print(f'{blocks:.2f} blocks are stored a turn on both workers')
  save_rows(_JSON.value, rows)


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments {argv[1:]}; options begin with --.')
  if _BESIDE.value is not None:
    beside(_BESIDE.value)
    return
  if _CACHED.value is not None:
    beside_cached(_CACHED.value)
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
