"""The programs of a worker: what each takes of its bytes and gives back, for which sizes, and how it first runs.

A program is a pure function of parts of a worker's state and of arguments. The parts that it gives back are donated,
so that they are updated in place. All programs of every role that a worker may take are compiled at warm-up and
rehearsed once. Another program is another class in `KINDS`.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from pdjax.engine.packing import Packing
from pdjax.engine.slots import Slots
from pdjax.engine.steps import Chunks, Steps
from pdjax.kv.pages import KVPages, copy
from pdjax.kv.pool import Pool
from pdjax.model.sampling import Chosen
from pdjax.model.transformer import Weights
from pdjax.types import cache
from pdjax.types.model import ModelSpec
from pdjax.types.worker import Role, WorkerSpec


class State(Protocol):
  """A worker's bytes, which its programs work on."""

  weights: Weights
  pools: dict[str, Pool]
  slots: Slots


class Part(abc.ABC):
  """A part of a worker's state that programs take, and may give back."""

  @abc.abstractmethod
  def of(self, state: State) -> Any:
    """Its value now."""

  def put(self, state: State, new: Any) -> None:
    """Replace its value."""
    raise AssertionError(f'{self} is only read')


@dataclasses.dataclass(frozen=True)
class Whole(Part):
  """All that a worker has under one name."""

  name: str

  def of(self, state: State) -> Any:
    return getattr(state, self.name)

  def put(self, state: State, new: Any) -> None:
    setattr(state, self.name, new)


@dataclasses.dataclass(frozen=True)
class PagesOf(Part):
  """The pages of a cache kind."""

  kind: str

  def of(self, state: State) -> KVPages:
    return state.pools[self.kind].pages

  def put(self, state: State, new: KVPages) -> None:
    state.pools[self.kind].pages = new


WEIGHTS, SLOTS = Whole('weights'), Whole('slots')
KV = PagesOf(cache.KV)


@dataclasses.dataclass(frozen=True)
class LayersOf(Part):
  """The layers from `first` up to `stop` of a pool of pages."""

  pool: Part
  first: int
  stop: int

  def of(self, state: State) -> KVPages:
    return self.pool.of(state).part(self.first, self.stop)

  def put(self, state: State, new: KVPages) -> None:
    self.pool.put(state, self.pool.of(state).with_part(self.first, new))


@dataclasses.dataclass(frozen=True)
class LayerWeights(Part):
  """The weights of the layers from `first` up to `stop`, one item for each."""

  first: int
  stop: int

  def of(self, state: State) -> list[Weights]:
    layers = WEIGHTS.of(state)['layers']
    return [layers[layer] for layer in range(self.first, self.stop)]


@dataclasses.dataclass(frozen=True)
class Group:
  """Layers from `first` up to `stop` that run as one program, which is compiled for those from `like` on.

  Groups that are as long and have equal windows share a program, that of the first of them.
  """

  first: int
  stop: int
  like: int

  @property
  def bounds(self) -> tuple[int, int]:
    """The first layer and the one after the last, as orders name the group."""
    return self.first, self.stop


def layer_groups(model: ModelSpec, bounds: Sequence[tuple[int, int]]) -> tuple[Group, ...]:
  """The groups of layers with these bounds, as (first, one after the last)."""
  like: dict[tuple, int] = {}
  windows = [tuple(map(model.window, range(*group))) for group in bounds]
  return tuple(Group(*group, like.setdefault(window, group[0])) for group, window in zip(bounds, windows, strict=True))


Run = Callable[..., tuple[Any, ...]]  # takes a program and its arguments; its outputs beside the parts it gives back


class Program(abc.ABC):
  """A function that a worker's devices run, compiled for one size."""

  @property
  @abc.abstractmethod
  def name(self) -> str:
    """Its kind and sizes: what it is known and reported by. Programs of one name are one."""

  @property
  @abc.abstractmethod
  def takes(self) -> tuple[Part, ...]:
    """The parts of the state that are its first arguments."""

  @property
  @abc.abstractmethod
  def gives_back(self) -> tuple[Part, ...]:
    """Those of them that are donated, and come back updated as its first outputs."""

  @property
  def donates(self) -> tuple[int, ...]:
    """The places of the arguments whose bytes it may reuse."""
    return tuple(place for place, part in enumerate(self.takes) if part in self.gives_back)

  @classmethod
  @abc.abstractmethod
  def all_of(cls, spec: WorkerSpec, groups: Sequence[Group]) -> list['Program']:
    """The programs of this kind that a worker has, one for each bucket; none if none of its roles has a use for them.

    Args:
      spec: The worker.
      groups: The groups of layers that its prefill steps run in; none if they run whole.
    """

  @abc.abstractmethod
  def function(self, steps: Steps) -> Callable[..., Any]:
    """The pure function that is compiled."""

  @abc.abstractmethod
  def one_token(self, packing: Packing) -> tuple[Any, ...]:
    """Its arguments beside the state: for one token, in page 0 and slot 0, that its sequence ends with."""

  def rehearse(self, run: Run, packing: Packing) -> None:
    """Run it once for one token, for a program's first run is slow."""
    run(self, *self.one_token(packing))


@dataclasses.dataclass(frozen=True)
class Remember(Program):
  """Notes a sequence's past in a row of the history: the row, and its past `[V]`."""

  name = 'remember'
  takes = gives_back = (SLOTS,)

  @classmethod
  def all_of(cls, spec: WorkerSpec, groups: Sequence[Group]) -> list[Program]:
    return [cls()]

  def function(self, steps: Steps) -> Callable[..., Any]:
    return Slots.remember

  def one_token(self, packing: Packing) -> tuple[Any, ...]:
    return np.int32(0), np.zeros(packing.model.vocab_size, np.uint16)


@dataclasses.dataclass(frozen=True)
class Admit(Program):
  """Replaces slots: their numbers `[S]`, and the rows that come into them."""

  name = 'admit'
  takes = gives_back = (SLOTS,)

  @classmethod
  def all_of(cls, spec: WorkerSpec, groups: Sequence[Group]) -> list[Program]:
    return [cls()] if spec.ever_decodes else []

  def function(self, steps: Steps) -> Callable[..., Any]:
    return Slots.put

  def one_token(self, packing: Packing) -> tuple[Any, ...]:
    rows = packing.empty_rows()
    rows.alive[0] = True
    return packing.slots((0,), rows)


@dataclasses.dataclass(frozen=True)
class Grow(Program):
  """Puts pages into the tables of slots: their numbers, the places in the tables, and the pages, each `[n]`."""

  name = 'grow'
  takes = gives_back = (SLOTS,)

  @classmethod
  def all_of(cls, spec: WorkerSpec, groups: Sequence[Group]) -> list[Program]:
    return [cls()] if spec.ever_decodes else []

  def function(self, steps: Steps) -> Callable[..., Any]:
    return Slots.grow

  def one_token(self, packing: Packing) -> tuple[Any, ...]:
    (arguments,) = packing.grown([(0, {KV.kind: (0, (0,))})])
    return arguments


@dataclasses.dataclass(frozen=True)
class Copy(Program):
  """Copies a page over another: the numbers of both."""

  name = 'copy'
  takes = gives_back = (KV,)

  @classmethod
  def all_of(cls, spec: WorkerSpec, groups: Sequence[Group]) -> list[Program]:
    return [cls()]

  def function(self, steps: Steps) -> Callable[..., Any]:
    return copy

  def one_token(self, packing: Packing) -> tuple[Any, ...]:
    return np.int32(0), np.int32(0)


@dataclasses.dataclass(frozen=True)
class Prefill(Program):
  """Prompt chunks of up to so many tokens, where nothing decodes: `Chunks`; gives their next tokens `[C]`."""

  tokens: int

  takes, gives_back = (WEIGHTS, KV, SLOTS), (KV, SLOTS)

  @property
  def name(self) -> str:
    return f'prefillx{self.tokens}'

  @classmethod
  def all_of(cls, spec: WorkerSpec, groups: Sequence[Group]) -> list[Program]:
    whole = Role.PREFILL in spec.roles and not groups
    return [cls(tokens) for tokens in spec.token_buckets] if whole else []

  def function(self, steps: Steps) -> Callable[..., Any]:
    return steps.prefill

  def one_token(self, packing: Packing) -> tuple[Any, ...]:
    return (_one_token_chunk(packing, self.tokens),)


@dataclasses.dataclass(frozen=True)
class Fused(Program):
  """Prompt chunks and one decode step together, on a worker that has or may take both roles.

  Takes `Chunks` and the numbers of slots `[B]`; gives the next tokens of either, `[C]` and `[1, B]`.
  """

  tokens: int
  batch: int

  takes, gives_back = (WEIGHTS, KV, SLOTS), (KV, SLOTS)

  @property
  def name(self) -> str:
    return f'fusedx{self.tokens}x{self.batch}'

  @classmethod
  def all_of(cls, spec: WorkerSpec, groups: Sequence[Group]) -> list[Program]:
    fuses = Role.BOTH in spec.roles
    return [cls(tokens, spec.max_sequences) for tokens in spec.token_buckets] if fuses else []

  def function(self, steps: Steps) -> Callable[..., Any]:
    return steps.fused

  def one_token(self, packing: Packing) -> tuple[Any, ...]:
    return _one_token_chunk(packing, self.tokens), packing.ids((0,), self.batch)

  def rehearse(self, run: Run, packing: Packing) -> None:
    _admit_one(run, packing)
    super().rehearse(run, packing)


@dataclasses.dataclass(frozen=True)
class Begin(Program):
  """The first program of a prefill step in groups of layers: `Chunks`; gives `[T, E]`.

  Where some chunks travel layer by layer, all steps run in groups of layers: equal groups are one program, so that
  much less is compiled than with the whole step as another, and on the devices a few more programs cost little.
  """

  tokens: int
  groups: tuple[Group, ...]  # of the whole step, for its rehearsal

  takes, gives_back = (WEIGHTS,), ()

  @property
  def name(self) -> str:
    return f'beginx{self.tokens}'

  @classmethod
  def all_of(cls, spec: WorkerSpec, groups: Sequence[Group]) -> list[Program]:
    return [cls(tokens, tuple(groups)) for tokens in spec.token_buckets] if groups else []

  def function(self, steps: Steps) -> Callable[..., Any]:
    return steps.begin

  def one_token(self, packing: Packing) -> tuple[Any, ...]:
    return (_one_token_chunk(packing, self.tokens),)

  def rehearse(self, run: Run, packing: Packing) -> None:
    run_groups(run, self.groups, *self.one_token(packing))


@dataclasses.dataclass(frozen=True)
class Layers(Program):
  """A group of layers of such a step: `[T, E]`, which is donated too, and `Chunks`; gives `[T, E]`."""

  tokens: int
  group: Group

  @property
  def name(self) -> str:
    return f'layersx{self.tokens}x{self.group.like}x{self.group.stop - self.group.first}'

  @property
  def takes(self) -> tuple[Part, ...]:
    return LayerWeights(*self.group.bounds), *self.gives_back

  @property
  def gives_back(self) -> tuple[Part, ...]:
    return (LayersOf(KV, *self.group.bounds),)

  @property
  def donates(self) -> tuple[int, ...]:
    return *super().donates, len(self.takes)

  @classmethod
  def all_of(cls, spec: WorkerSpec, groups: Sequence[Group]) -> list[Program]:
    return [cls(tokens, group) for tokens in spec.token_buckets for group in groups if group.first == group.like]

  def function(self, steps: Steps) -> Callable[..., Any]:
    return functools.partial(steps.layers, self.group.like)

  def one_token(self, packing: Packing) -> tuple[Any, ...]:
    return packing.embedded(self.tokens), _one_token_chunk(packing, self.tokens)

  def rehearse(self, run: Run, packing: Packing) -> None:
    """Runs with `Begin`."""


@dataclasses.dataclass(frozen=True)
class Finish(Program):
  """The last program of such a step: `[T, E]` and `Chunks`; gives the next tokens of chunks `[C]`."""

  tokens: int

  takes, gives_back = (WEIGHTS, SLOTS), (SLOTS,)

  @property
  def name(self) -> str:
    return f'finishx{self.tokens}'

  @classmethod
  def all_of(cls, spec: WorkerSpec, groups: Sequence[Group]) -> list[Program]:
    return [cls(tokens) for tokens in spec.token_buckets] if groups else []

  def function(self, steps: Steps) -> Callable[..., Any]:
    return steps.finish

  def one_token(self, packing: Packing) -> tuple[Any, ...]:
    return packing.embedded(self.tokens), _one_token_chunk(packing, self.tokens)

  def rehearse(self, run: Run, packing: Packing) -> None:
    """Runs with `Begin`."""


@dataclasses.dataclass(frozen=True)
class Decode(Program):
  """Decode steps of up to so many sequences: the numbers of their slots `[B]`, and how many steps; gives tokens.

  There are `[max_fused_steps, B]`, of which the first steps count.
  """

  batch: int

  takes, gives_back = (WEIGHTS, KV, SLOTS), (KV, SLOTS)

  @property
  def name(self) -> str:
    return f'decodex{self.batch}'

  @classmethod
  def all_of(cls, spec: WorkerSpec, groups: Sequence[Group]) -> list[Program]:
    return [cls(batch) for batch in spec.batch_buckets] if spec.ever_decodes else []

  def function(self, steps: Steps) -> Callable[..., Any]:
    return steps.decode

  def one_token(self, packing: Packing) -> tuple[Any, ...]:
    return packing.ids((0,), self.batch), np.int32(1)

  def rehearse(self, run: Run, packing: Packing) -> None:
    _admit_one(run, packing)
    super().rehearse(run, packing)


KINDS: tuple[type[Program], ...] = (Remember, Admit, Grow, Copy, Prefill, Fused, Begin, Layers, Finish, Decode)


def programs_of(spec: WorkerSpec, groups: Sequence[Group]) -> dict[str, Program]:
  """All programs of a worker whose prefill steps run in these groups of layers, if any; by name."""
  return {program.name: program for kind in KINDS for program in kind.all_of(spec, groups)}


def run_groups(
  run: Run, groups: Sequence[Group], chunks: Chunks, after: Callable[[tuple[int, int]], None] = lambda group: None
) -> Chosen:
  """Run a prefill step group of layers by group; `after` is called with the bounds of each behind it."""
  size = chunks.tokens.shape[0]
  (x,) = run(Begin(size, tuple(groups)), chunks)
  for group in groups:
    (x,) = run(Layers(size, group), x, chunks)
    after(group.bounds)
  (chosen,) = run(Finish(size), x, chunks)
  return chosen


def _one_token_chunk(packing: Packing, tokens: int) -> Chunks:
  chunks = packing.chunks((), tokens)
  chunks.offsets[1:], chunks.lengths[:1] = 1, 1
  return chunks


def _admit_one(run: Run, packing: Packing) -> None:
  """Put a sequence that is alive into slot 0, for a decode step that does something."""
  admit = Admit()
  run(admit, *admit.one_token(packing))
