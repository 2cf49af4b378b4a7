r"""Checks that KV moved between any two pools gives the tokens of a plain loop: meshes, pages, granularity, transport.

python -m experiments.check_transfers
python -m experiments.check_transfers --covering
python -m experiments.check_transfers --processes=12

Random models on virtual CPU devices, in float32: 12 key/value heads for tp 1 to 4, and 2 of them on 4 devices, where
each head has two copies (with those, only tp 1 and 2 can be paired otherwise: 3 does not divide them). Both ends of
`cross_process` are in one process, with a socket between them. By default every combination, with --covering so few
that each two values meet; each two meshes have a process. Prints what is wrong; the exit status is 1 if anything is.
SmolLM2 itself is checked by experiments.check_tokens.
"""

import dataclasses
import functools
import itertools
import math
import multiprocessing
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any, Literal

import jax
import jax.numpy as jnp
from absl import app, flags
from rich.console import Console

from pdjax.engine.build import prepare_devices
from pdjax.engine.engine import Engine
from pdjax.engine.worker import Worker
from pdjax.kv.transfer import TRANSPORTS
from pdjax.kv.transfer.by_pieces import WholeWay
from pdjax.kv.transfer.pieces import Shape
from pdjax.model.checkpoint import RandomCheckpoint
from pdjax.model.plain import PlainLoop
from pdjax.model.weights import load_weights
from pdjax.policies import Disaggregated
from pdjax.serving import ClusterState, serve
from pdjax.serving.events import Done, Finished
from pdjax.sharding import make_mesh
from pdjax.types import ModelSpec, Request, Role, SamplingParams, TransferSpec, WorkerSpec
from pdjax.types.cache import KV
from pdjax.types.model import GQA
from pdjax.types.transfer import GranularityName, TransportName
from pdjax.workload import Listed

_COVERING = flags.DEFINE_bool('covering', False, 'Only so many combinations that each two values meet in one.')
_PROCESSES = flags.DEFINE_integer('processes', 2, 'How many at a time; a core is enough for one.', lower_bound=1)

NUM_DEVICES = 8
OUTPUT_LEN = 3
PROMPT_LENS = (5, 37)  # one chunk that fills no page of 16; three chunks
_CHUNK = 16
_TWO_HEADS_TP = 4  # of the model with fewer heads: each has two copies
TWELVE = ModelSpec(
  name='random-12/12', num_layers=2, embed_dim=24, query_heads=12, kv_heads=12, head_dim=8, ffn_dim=48, vocab_size=96,
  context_len=64, eos_token_ids=(1,),
)  # fmt: skip
TWO = dataclasses.replace(TWELVE, name='random-12/2', attention=GQA(query_heads=12, kv_heads=2, head_dim=8))

Tp = Literal[1, 2, 3, 4, 'replicated']


@dataclasses.dataclass(frozen=True)
class Case:
  """Two pools, and how KV travels between them."""

  source_tp: Tp
  target_tp: Tp
  source_page: int
  target_page: int
  granularity: GranularityName
  transport: TransportName

  @property
  def model(self) -> ModelSpec:
    """The model that can be cut so."""
    return TWO if 'replicated' in (self.source_tp, self.target_tp) else TWELVE


def product() -> list[Case]:
  """Every combination of what two workers can be."""
  tps: tuple[Tp, ...] = (1, 2, 3, 4, 'replicated')
  pages = 1, 16, 64
  granularities: tuple[GranularityName, ...] = ('request', 'chunk', 'layers')
  transports: tuple[TransportName, ...] = ('device_put', 'host_staged', 'cross_process')
  cases = itertools.starmap(Case, itertools.product(tps, tps, pages, pages, granularities, transports))
  return [case for case in cases if case.model is TWELVE or not {3, 4} & {case.source_tp, case.target_tp}]


def covering(cases: Sequence[Case]) -> list[Case]:
  """Some of the cases, in which any two values meet that meet in one of all; chosen greedily."""

  def meetings(case: Case) -> set[tuple]:
    values = [(field.name, getattr(case, field.name)) for field in dataclasses.fields(case)]
    return set(itertools.combinations(values, 2))

  left = set().union(*map(meetings, cases))
  chosen = []
  while left:
    best = max(cases, key=lambda case: len(left & meetings(case)))
    chosen.append(best)
    left -= meetings(best)
  return chosen


class Pools:
  """Workers and ways between them, each built once."""

  def __init__(self):
    self._devices = prepare_devices('cpu', NUM_DEVICES)
    self._compiled: dict[WholeWay, set[Shape]] = {}

  def differing(self, case: Case) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Serve some prompts; by request the tokens that came and those that a plain loop gives, where they differ.

    Raises:
      AssertionError: if other bytes moved than the prompts have, or a page or staging was not given back.
    """
    source = self._worker('prefill', case.model, case.source_tp, case.source_page)
    target = self._worker('decode', case.model, case.target_tp, case.target_page)
    way = self._way(source, target, case.transport)
    self._compile(way, case.granularity == 'layers')
    workers, ways = [source, target], {('prefill', 'decode', KV): way}
    state = ClusterState(case.model, [worker.spec for worker in workers], 16, _spec(case.granularity))
    requests = [
      Request(f'r{length}', _prompt(length), SamplingParams(max_tokens=OUTPUT_LEN, ignore_eos=True))
      for length in PROMPT_LENS
    ]
    engine = Engine(workers, ways)
    try:
      engine.start_clock()
      events = list(serve(Listed(requests), Disaggregated(max_prefill_tokens=_CHUNK), engine, state))
    finally:
      engine.close()
    unit = math.gcd(case.source_page, case.target_page)
    moved = sum(event.wire_bytes for event in events if isinstance(event, Done))
    units = sum(-(-length // unit) for length in PROMPT_LENS)
    assert moved == units * unit * case.model.cached_token_bytes('float32'), f'{case} moved {moved} bytes'
    for place in state.workers.values():
      assert place.free_pages == place.num_pages and place.free_slots == place.spec.max_sequences, case
      holdings = state.books.holdings[place.name]
      assert holdings.staging_out.free_bytes == holdings.staging_in.free_bytes == state.view.transfer.staging_bytes, (
        case
      )
    tokens = {event.request: event.tokens for event in events if isinstance(event, Finished)}
    pairs = {request.id: (tokens[request.id], self._plain(case.model, request.prompt_len)) for request in requests}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

  @functools.cache  # noqa: B019 -- lives as long as the check
  def _worker(self, role: str, model: ModelSpec, tp: Tp, page_size: int) -> Worker:
    num_devices = _TWO_HEADS_TP if tp == 'replicated' else tp
    devices = self._devices[:num_devices] if role == 'prefill' else self._devices[-num_devices:]
    spec = WorkerSpec(
      role, Role(role), num_devices, num_pages=256 // page_size, max_sequences=1, max_step_tokens=_CHUNK, max_chunks=1,
      max_fused_steps=1, page_size=page_size, kv_dtype='float32',
    )  # fmt: skip
    mesh, weights = self._weights(model, tuple(devices))
    worker = Worker(spec, model, mesh, weights, None, _spec('layers'))
    worker.compile('highest')
    return worker

  @functools.cache  # noqa: B019
  def _weights(self, model: ModelSpec, devices: tuple[jax.Device, ...]) -> tuple[jax.sharding.Mesh, Any]:
    mesh = make_mesh(model, devices)
    return mesh, load_weights(RandomCheckpoint(model), model, {0: mesh}, jnp.dtype('float32'))[0]

  @functools.cache  # noqa: B019
  def _way(self, source: Worker, target: Worker, transport: TransportName) -> WholeWay:
    way = TRANSPORTS[transport](source.pools[KV], target.pools[KV], _spec('layers'))
    assert isinstance(way, WholeWay)
    return way

  def _compile(self, way: WholeWay, by_layers: bool) -> None:
    """Compile what is missing of the batches that are to travel: of groups of layers, or of all of them."""
    shapes = [shape for shape in way.pieces.shapes if (shape[0] < TWELVE.num_layers) == by_layers]
    for shape in set(shapes) - self._compiled.setdefault(way, set()):
      way.prepare(shape)
      way.rehearse(shape)
      self._compiled[way].add(shape)

  @functools.cache  # noqa: B019
  def _plain(self, model: ModelSpec, length: int) -> tuple[int, ...]:
    loop = PlainLoop(model, self._weights(model, (self._devices[0],))[1], model.context_len)
    return tuple(loop.generate(_prompt(length), OUTPUT_LEN))


def _spec(granularity: GranularityName) -> TransferSpec:
  return TransferSpec(granularity=granularity, piece_bytes=8192)


def _prompt(length: int) -> tuple[int, ...]:
  return tuple(2 + (length * 31 + i * 7 + i * i) % (TWELVE.vocab_size - 2) for i in range(length))


def check(cases: Sequence[Case]) -> list[tuple[Case, Any]]:
  """Serve each case; those that are not right, with what came and what should have, or with the error."""
  pools = Pools()
  found: list[tuple[Case, Any]] = []
  for case in cases:
    try:
      differing = pools.differing(case)
    except Exception as error:
      found.append((case, repr(error)))
    else:
      found += [(case, differing)] if differing else []
  return found


def check_apart(cases: Sequence[Case], processes: int) -> Iterator[tuple[int, list[tuple[Case, Any]]]]:
  """The same in processes, of which each has what is served between two meshes: how many cases, and what is wrong."""
  parts: dict[tuple[Tp, Tp], list[Case]] = {}
  for case in cases:
    parts.setdefault((case.source_tp, case.target_tp), []).append(case)
  fresh = multiprocessing.get_context('spawn')  # each starts JAX for itself
  with ProcessPoolExecutor(processes, mp_context=fresh, max_tasks_per_child=1) as pool:
    futures = {pool.submit(check, part): len(part) for part in parts.values()}
    for future in as_completed(futures):
      yield futures[future], future.result()


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments {argv[1:]}; options begin with --.')
  cases = covering(product()) if _COVERING.value else product()
  console, begin, done, failed = Console(highlight=False), time.perf_counter(), 0, 0
  for count, differing in check_apart(cases, _PROCESSES.value):
    done += count
    failed += len(differing)
    for case, tokens in differing:
      console.print(f'[red]{case}[/]: {tokens}')
    console.print(f'{done} of {len(cases)}, {time.perf_counter() - begin:.0f} s, {failed} wrong')
  sys.exit(bool(failed))


if __name__ == '__main__':
  app.run(main)
