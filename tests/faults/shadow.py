"""A simulator whose pages hold something: each token depends on every token that a step finds in its sequence's pages.

So a page that was freed too early, given to two, written too late or never sent shows in the tokens, as on devices. A
step happens when it is handed over and a transfer reads its pages then, as programs are dispatched; what a transfer
brings is written when it ends.
"""

import dataclasses
import zlib
from collections.abc import Callable, Sequence

import numpy as np

from experiments.faults.chaos import Fault
from pdjax.serving.bounds import Bounds
from pdjax.serving.events import Done, Event, Failed, Result, WorkerBack, WorkerLost
from pdjax.serving.orders import AbandonOrder, ChunkOrder, Order, StepOrder, TransferOrder
from pdjax.simulator import Simulator
from pdjax.standing_run import StandingRun
from pdjax.types import ModelSpec, Request


def next_token(sequence: Sequence[object], model: ModelSpec) -> int:
  """The token that follows a sequence; never the token that ends it."""
  return 2 + zlib.crc32(repr(list(sequence)).encode()) % (model.vocab_size - 2)


def plain_tokens(model: ModelSpec, request: Request, output_len: int | None = None) -> tuple[int, ...]:
  """The tokens of a request of one sample where nothing fails."""
  tokens: list[int] = []
  limit = request.token_limit(model.context_len, lambda _: output_len)
  while len(tokens) < limit:
    tokens.append(next_token((*request.prompt, *tokens), model))
  return tuple(tokens)


@dataclasses.dataclass
class _Sequence:
  """The content of a slot."""

  request: Request
  pages: tuple[int, ...]
  cached: int
  last: int
  generated: int
  limit: int


class ShadowSimulator(Simulator):
  """The simulator with contents of pages, and with transfers and workers that fail on demand.

  Args:
    page_sizes: Tokens per page of each worker.
    fault_of: The fault of a transfer, or None.
    slow_s: Seconds that a slow one takes longer.
    checksums: Whether pages that are not those that were sent are found.
  """

  def __init__(
    self,
    *args,
    page_sizes: dict[str, int],
    fault_of: Callable[[TransferOrder], Fault | None] = lambda order: None,
    slow_s: float = 5.0,
    checksums: bool = True,
  ):
    super().__init__(*args, leaps=False)
    self.incarnations = dict.fromkeys(self._workers, 1)
    self.fault_of = fault_of
    self._page_sizes = page_sizes
    self._slow_s = slow_s
    self._checksums = checksums
    self._pages: dict[tuple[str, int], list[object]] = {}  # layer by layer, by worker and page · page size + offset
    self._slots: dict[tuple[str, int], _Sequence] = {}
    self._firsts: dict[tuple[int, str], int] = {}  # by order and request
    self._columns: dict[int, list[list[int | None]]] = {}  # of each decode step of an order, a token a row
    self._contents: dict[int, list[list[object]]] = {}  # of transfers that may still be written

  def lose(self, worker: str, error: str = 'it is gone') -> tuple[WorkerLost, WorkerBack]:
    """A worker dies now with all it holds, and begins another incarnation; earlier orders are not heard of again."""
    self.incarnations[worker] += 1
    self._pages = {place: token for place, token in self._pages.items() if place[0] != worker}
    self._slots = {place: one for place, one in self._slots.items() if place[0] != worker}
    self._bounds[worker] = Bounds()
    for run in self._runs[worker]:
      run.version += 1  # nothing more is told of it
    self._runs[worker] = []
    return WorkerLost(worker, self._now_s, error), WorkerBack(worker, self._now_s, self.incarnations[worker])

  def _submit(self, order: Order) -> None:
    match order:
      case StepOrder():
        if order.incarnation != self.incarnations[order.worker]:
          return  # handed over before anyone knew
      case TransferOrder():
        present = self.incarnations[order.source], self.incarnations[order.target]
        if order.incarnations != present:
          return
        fault = self.fault_of(order)
        if fault == 'refused':
          self._ends_s[order.id] = self._now_s
          self._push(order.id, lambda: Failed(order.id, self._ends_s.pop(order.id), 'the transport refused it'))
          return
        self._contents[order.id] = self._sent(order, fault)
        if fault == 'stalls':
          return
        if fault is not None:
          self._begin_faulty(order, fault)
          return
      case AbandonOrder():
        self._contents.pop(order.transfer, None)
    super()._submit(order)

  def _begin_faulty(self, order: TransferOrder, fault: Fault) -> None:
    seconds = self._cost.transfer_seconds(
      self._model, self._workers[order.source], self._workers[order.target], order.num_bytes
    ) + (self._slow_s if fault == 'slow' else 0)
    began_s = self._begin((('way out', order.source),), seconds, order.id, self._ready_s(order))

    def end() -> Event:
      if fault == 'slow' or (fault in ('corrupts', 'permutes') and not self._checksums):
        return self._transfer_done(order, began_s)
      self._contents.pop(order.id, None)
      ended_s = self._ends_s.pop(order.id)
      return Failed(order.id, ended_s, 'the link broke' if fault == 'fails' else 'damaged', fault != 'fails')

    self._push(order.id, end)

  def _transfer_done(self, order: TransferOrder, began_s: float) -> Done | Failed:
    contents = self._contents.pop(order.id, None)
    if order.incarnations != (self.incarnations[order.source], self.incarnations[order.target]):
      return Failed(order.id, self._ends_s.pop(order.id), 'one of its workers is gone')  # its pages are others' by now
    if contents is not None:
      size, layers = self._page_sizes[order.target], slice(*(order.span.layers or (0, None)))
      for position, sent in enumerate(contents, order.span.start):
        page = order.span.target_pages[position // size - order.span.start // size]
        held = self._at(order.target, page * size + position % size)
        held[layers] = sent[layers]
    return super()._transfer_done(order, began_s)

  def _sent(self, order: TransferOrder, fault: Fault | None) -> list[list[object]]:
    size = self._page_sizes[order.source]
    contents = []
    for position in range(order.span.start, order.span.start + order.span.tokens):
      page = order.span.source_pages[position // size - order.span.start // size]
      contents.append(list(self._at(order.source, page * size + position % size)))
    if fault == 'corrupts':
      contents[0] = ['damaged'] * self._model.num_layers
    elif fault == 'permutes':
      contents.reverse()
    return contents

  # -------------------------------------------------------------------------- steps

  def _submit_step(self, order: StepOrder) -> None:
    name = order.worker
    for join in order.joins:
      if (new := join.admission) is not None:
        for pair in new.copies.get('kv', ()):
          self._copy(name, *pair)
        last = new.tokens[-1] if new.tokens else new.request.prompt[-1]
        cached = new.request.prompt_len + len(new.tokens) - 1
        self._slots[name, join.slot] = _Sequence(new.request, new.pages['kv'], cached, last, len(new.tokens), new.limit)
    for growth in order.growth:
      if 'kv' in growth.pages:
        sequence = self._slots[name, growth.slot]
        first, pages = growth.pages['kv']
        assert first == len(sequence.pages), f'{growth} leaves out pages'
        sequence.pages = (*sequence.pages, *pages)
    for chunk in order.chunks:
      for pair in chunk.copies.get('kv', ()):
        self._copy(name, *pair)
      for position, token in enumerate(chunk.token_ids, chunk.start):
        self._write(name, chunk.pages['kv'], position, token)
      if chunk.is_last:
        token = next_token(self._read(name, chunk.pages['kv'], chunk.request.prompt_len), self._model)
        first = _Sequence(chunk.request, chunk.pages['kv'], chunk.request.prompt_len, token, 1, chunk.limit)
        self._firsts[order.id, chunk.request.id] = token
        if chunk.slot is not None:
          self._slots[name, chunk.slot] = first
    assert not {chunk.request.id for chunk in order.chunks} & set(order.batch.requests)
    self._columns[order.id] = []
    super()._submit_step(order)

  def _first(self, chunk: ChunkOrder) -> Result:
    token = next(token for (_, name), token in reversed(self._firsts.items()) if name == chunk.request.id)
    return dataclasses.replace(super()._first(chunk), tokens=(token,))

  def _dispatch(self, run: StandingRun) -> None:
    super()._dispatch(run)
    self._compute(run.order, run.given)

  def _tokens(self, order: StepOrder, before: int, after: int) -> np.ndarray:
    if not order.standing:
      self._compute(order, after)
    columns = self._columns[order.id][before:after]
    assert len(columns) == after - before, 'a step is told of that was not handed over'
    tokens = np.full((after - before, len(order.batch)), -1, np.int32)
    for row in range(len(order.batch)):
      got = [column[row] for column in columns if column[row] is not None]
      tokens[: len(got), row] = got
    return tokens

  def _compute(self, order: StepOrder, steps: int) -> None:
    columns = self._columns[order.id]
    while len(columns) < steps:
      columns.append(
        [self._decode(order.worker, *row) for row in zip(order.batch.requests, order.batch.slots, strict=True)]
      )

  def _decode(self, worker: str, request: str, slot: int) -> int | None:
    """Have a sequence get its next token; None if it has ended."""
    sequence = self._slots[worker, slot]
    assert sequence.request.id == request
    if sequence.generated >= sequence.limit:
      return None
    self._write(worker, sequence.pages, sequence.cached, sequence.last)
    sequence.cached += 1
    sequence.last = next_token(self._read(worker, sequence.pages, sequence.cached), self._model)
    sequence.generated += 1
    return sequence.last

  def _write(self, worker: str, pages: Sequence[int], position: int, token: object) -> None:
    size = self._page_sizes[worker]
    self._at(worker, pages[position // size] * size + position % size)[:] = [token] * self._model.num_layers

  def _at(self, worker: str, place: int) -> list[object]:
    return self._pages.setdefault((worker, place), [None] * self._model.num_layers)

  def _read(self, worker: str, pages: Sequence[int], count: int) -> list[object]:
    size = self._page_sizes[worker]
    held = (self._at(worker, pages[i // size] * size + i % size) for i in range(count))
    return [layers[0] if len(set(layers)) == 1 else tuple(layers) for layers in held]

  def _copy(self, worker: str, source: int, target: int) -> None:
    size = self._page_sizes[worker]
    for offset in range(size):
      self._at(worker, target * size + offset)[:] = self._at(worker, source * size + offset)
