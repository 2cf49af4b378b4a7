"""Turns of the host loop that are timed: the policy, the state and the log, with a backend that does nothing."""

import collections
import dataclasses
import gc
import time
from collections.abc import Sequence

import numpy as np

from pdjax.metrics import EventLog
from pdjax.policies import Disaggregated
from pdjax.serving import ClusterState, Policy, serve
from pdjax.serving.block_keys import KEY_BYTES
from pdjax.serving.events import BlockStored, Decoded, Delivered, Done, Ended, Event, Result, Turn
from pdjax.serving.orders import Order, StepOrder
from pdjax.serving.requests import RequestState
from pdjax.types import ModelSpec, PrefixCache, Request, SamplingParams, WorkerSpec, decode_pool, prefill_pool
from pdjax.workload import ClosedLoop, Listed, RandomTokens

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
