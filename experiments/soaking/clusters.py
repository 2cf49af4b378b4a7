"""The tiny clusters that a soak serves on, compiled once: two that it disturbs, and one that nobody disturbs."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from experiments.faults.engine_faults import FaultyWay, FaultyWorker, fresh
from experiments.few_buckets import with_few_buckets
from pdjax.completions import complete
from pdjax.config import ServingConfig
from pdjax.deployment import Deployment, deploy
from pdjax.engine.engine import Engine
from pdjax.kv.transfer import DevicePut, Transport
from pdjax.model.tokenizer import Tokenizer
from pdjax.opened_model import OpenedModel
from pdjax.policies import Colocated, Disaggregated
from pdjax.serving import ClusterState, Policy
from pdjax.serving.built import Serving
from pdjax.serving.events import Event
from pdjax.types import (
  Completion,
  ModelSpec,
  Request,
  Role,
  TransferSpec,
  WorkerSpec,
  colocated_pool,
  decode_pool,
  prefill_pool,
)
from pdjax.workload import Listed

DEADLINE_S = 0.4  # of transfers, which take a few milliseconds
PAGE_SIZE = 4
MODEL = ModelSpec(
  name='soak', num_layers=2, embed_dim=24, query_heads=4, kv_heads=2, head_dim=8, ffn_dim=48, vocab_size=264,
  context_len=96, eos_token_ids=(1,),
)  # fmt: skip
_SIZES = {'max_sequences': 4, 'max_step_tokens': 32, 'max_chunks': 4, 'num_pages': 72}
_STAGED_PAGES = 24
_FEW_PAGES = {Role.PREFILL: 24, Role.DECODE: 40, Role.BOTH: 40}  # the largest request needs 24 of a prompt, or 38
FEW_PAGES: dict[str, dict[Role, int]] = {  # by kind of fault; a worker of both phases has few with either
  'prefill_full': {role: _FEW_PAGES[role] for role in (Role.PREFILL, Role.BOTH)},
  'decode_full': {role: _FEW_PAGES[role] for role in (Role.DECODE, Role.BOTH)},
  'both_full': _FEW_PAGES,
}
_TRANSFER = TransferSpec(
  granularity='chunk',
  piece_bytes=4096,
  staging_bytes=_STAGED_PAGES * PAGE_SIZE * MODEL.cached_token_bytes('float32'),
  deadline_s=DEADLINE_S,
  checksums=True,
)


@functools.cache
def tokenizer() -> Tokenizer:
  """One token a byte, and two special ones; a few ids of the model's vocabulary are beyond it and have no text."""
  letters = sorted(pre_tokenizers.ByteLevel.alphabet())
  vocabulary = {'<s>': 0, '</s>': 1} | {letter: 2 + index for index, letter in enumerate(letters)}
  backend = tokenizers.Tokenizer(models.BPE(vocabulary, []))
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  backend.decoder = decoders.ByteLevel()
  backend.add_special_tokens(['<s>', '</s>'])
  return Tokenizer(backend, eos_token_ids=MODEL.eos_token_ids)


def _config(name: str) -> ServingConfig:
  clusters: dict[str, tuple[tuple[WorkerSpec, ...], Policy]] = {
    '2P2D': (prefill_pool(2, **_SIZES) + decode_pool(2, **_SIZES), Disaggregated(max_prefill_tokens=16)),
    '2C': (colocated_pool(2, **_SIZES), Colocated(token_budget=16, decode_steps=2)),
    'alone': (
      colocated_pool(1, **_SIZES | {'max_sequences': 8, 'num_pages': 512}),
      Colocated(token_budget=32, decode_steps=4),
    ),
  }
  workers, policy = clusters[name]
  return ServingConfig(
    model=MODEL,
    checkpoint='random',
    workers=with_few_buckets(workers, (max(worker.max_sequences for worker in workers),)),
    policy=policy,
    page_size=PAGE_SIZE,
    transfer=_TRANSFER,
    platform='cpu',
  )


@dataclasses.dataclass(frozen=True)
class Watched(Deployment):
  """A deployment that remembers the states that were served with.

  Attributes:
    states: All of them, in order.
  """

  states: list[ClusterState] = dataclasses.field(default_factory=list)

  def empty_state(self) -> ClusterState:
    """The state of the cluster before anything arrives."""
    state = super().empty_state()
    self.states.append(state)
    return state


class Cluster:
  """Compiled workers of one of the clusters, under a new engine whenever one is wanted.

  Attributes:
    name: Of the cluster, such as '2P2D'.
  """

  def __init__(self, name: str, say: Callable[[str], None] = lambda line: None):
    """Load and compile it; `say` is told in a line what is being done."""
    self.name = name
    self._deployment = deploy(_config(name), OpenedModel(MODEL, None, tokenizer()), say=say)
    engine = self._deployment.built.backend
    assert isinstance(engine, Engine)
    engine.close()
    self._workers = list(engine.workers.values())
    self._ways: dict[tuple[str, str, str], Transport] = dict(engine._transports)

  def engine(self) -> Engine:
    """A new engine over the workers and ways; whoever takes it closes it."""
    return Engine(self._workers, self._ways)

  def deployed(self, engine: Serving, pages: Mapping[Role, int] = {}, **fields: Any) -> Watched:
    """The deployment of a session: the cluster on `engine`, with some fields of the config replaced.

    Args:
      engine: The engine.
      pages: Pages of each worker of a role, where it may not use all that it has.
      **fields: Of the config.
    """
    deployment = self._deployment
    workers = tuple(
      dataclasses.replace(one, num_pages=pages.get(one.role, one.num_pages)) for one in deployment.built.workers
    )
    built = dataclasses.replace(deployment.built, backend=engine, workers=workers)
    return Watched(dataclasses.replace(deployment.config, **fields), deployment.opened, built)


class FaultyCluster(Cluster):
  """A cluster whose steps and transfers may fail."""

  def __init__(self, name: str, say: Callable[[str], None] = lambda line: None):
    super().__init__(name, say)
    for worker in self._workers:
      FaultyWorker.of(worker)
    self._faulty: list[FaultyWay] = []
    for way, transport in self._ways.items():
      assert isinstance(transport, DevicePut)
      faulty = self._ways[way] = FaultyWay(transport)
      self._faulty.append(faulty)

  @contextlib.contextmanager
  def fresh(self) -> Iterator[Engine]:
    """A new engine with nothing wrong yet; in the end it is closed, and whatever stands still goes on."""
    for worker in self._workers:
      worker.forget_all()
      if worker.broken:  # by the last step of the engine before, of which nobody learned
        worker.reset()
    with fresh(self._faulty, self._workers):
      engine = self.engine()
      with contextlib.closing(engine):
        yield engine


class Alone(Cluster):
  """The cluster that nobody disturbs: its answers are those that everyone is to get."""

  def __init__(self, say: Callable[[str], None] = lambda line: None):
    super().__init__('alone', say)

  def serve(self, requests: Iterable[Request], watch: Callable[[Event], None]) -> Sequence[Completion]:
    """Answer requests of one sample each, all at once; `watch` is called with every event."""
    events = []
    with contextlib.closing(self.deployed(self.engine())) as deployment:
      for event in deployment.serve(Listed(requests)):
        events.append(event)
        watch(event)
    return complete(events, has_text=True)
