"""NumPy rows that a worker's programs are given, packed out of orders at the sizes that they are compiled for."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pdjax.engine.slots import Sequences, Slots
from pdjax.engine.steps import Chunks
from pdjax.model.sampling import Sampling
from pdjax.serving.orders import Admission, ChunkOrder, PageGrowth
from pdjax.types.cache import KV
from pdjax.types.model import ModelSpec
from pdjax.types.worker import WorkerSpec


@dataclasses.dataclass(frozen=True)
class Packing:
  """The sizes of one worker's rows, and how orders are put into them.

  Attributes:
    spec: The worker, whose `page_size` is filled in.
    model: The model it serves.
    dtype: Of its weights.
  """

  spec: WorkerSpec
  model: ModelSpec
  dtype: jnp.dtype

  @functools.cached_property
  def num_slots(self) -> int:
    """The worker's slots; one past the last stands for none."""
    return self.spec.max_sequences if self.spec.ever_decodes else 1

  @functools.cached_property
  def table_width(self) -> int:
    """The most pages of a sequence."""
    assert self.spec.page_size
    return -(-self.model.context_len // self.spec.page_size)

  def empty_rows(self) -> Sequences:
    """A row for each slot, none alive."""
    return Sequences.empty(self.num_slots, self.table_width)

  def empty_slots(self) -> Slots:
    """All slots, none alive, and an empty history, with rows for chunks behind those of the slots."""
    history: Any = np.zeros((self.num_slots + self.spec.max_chunks, self.model.vocab_size), np.uint16)
    return Slots(self.empty_rows(), history)

  def admitted(self, admissions: Sequence[Admission]) -> Sequences:
    """As many rows, of which the first are these sequences, ready for their next token."""
    rows = self.empty_rows()
    for row, admission in enumerate(admissions):
      request, tokens = admission.request, admission.tokens
      rows.tokens[row] = tokens[-1] if tokens else request.prompt[-1]
      rows.lengths[row] = request.prompt_len + len(tokens) - 1
      rows.generated[row] = len(tokens)
      rows.alive[row] = True
      pages = admission.pages[KV]
      rows.tables[row, : len(pages)] = pages
    return dataclasses.replace(rows, sampling=self._sampling(admissions, self.num_slots))

  def ids(self, slots: Sequence[int], size: int) -> np.ndarray:
    """The numbers of slots, `[size]`."""
    ids = np.full(size, self.num_slots, np.int32)
    ids[: len(slots)] = slots
    return ids

  def slots(self, slots: Sequence[int], rows: Sequences) -> tuple[np.ndarray, Sequences]:
    """The arguments of a program that replaces these slots by the first of so many rows."""
    return self.ids(slots, self.num_slots), rows

  def grown(self, growths: Sequence[tuple[int, PageGrowth]]) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The arguments that give slots the pages by which their sequences grew, for as many runs as these take."""
    new = [
      (slot, first + place, page)
      for slot, growth in growths
      for first, pages in [growth.get(KV, (0, ()))]
      for place, page in enumerate(pages)
    ]
    size, runs = self.num_slots, []
    for begin in range(0, len(new), size):
      some = new[begin : begin + size]
      rows = np.full((3, size), self.num_slots, np.int32)  # one past the last slot, which is dropped
      rows[:, : len(some)] = np.array(some, np.int32).T
      runs.append((rows[0], rows[1], rows[2]))
    return runs

  def chunks(self, chunks: Sequence[ChunkOrder], size: int) -> Chunks:
    """Prompt chunks, packed into `size` tokens."""
    most = self.spec.max_chunks
    new: dict[str, Any] = {
      'tokens': np.zeros(size, np.int32),
      'offsets': np.zeros(most + 1, np.int32),
      'lengths': np.zeros(most, np.int32),
      'tables': np.zeros((most, self.table_width), np.int32),
      'slots': np.full(most, self.num_slots, np.int32),
    }
    end = 0
    for row, chunk in enumerate(chunks):
      stop = chunk.start + chunk.length
      new['tokens'][end : end + chunk.length] = chunk.token_ids
      end += chunk.length
      new['offsets'][row + 1 :] = end
      new['lengths'][row] = stop
      pages = chunk.pages[KV]
      new['tables'][row, : len(pages)] = pages
      if chunk.slot is not None:
        new['slots'][row] = chunk.slot
    return Chunks(**new, sampling=self._sampling(chunks, most))

  def embedded(self, size: int) -> jax.ShapeDtypeStruct:
    """Tokens between two layers, `[size, E]`: their shape alone, for they never leave the devices."""
    return jax.ShapeDtypeStruct((size, self.model.embed_dim), self.dtype)

  def _sampling(self, orders: Sequence[ChunkOrder | Admission], rows: int) -> Sampling:
    stops = [order.request.stop_tokens(self.model.eos_token_ids) for order in orders]
    return Sampling.stack([order.request.sampling for order in orders], [order.limit for order in orders], stops, rows)
