"""Workers' processes that are none: each a thread of this one with devices of its own, to test all but the process."""

import collections
import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Any

import jax

from pdjax.completions import complete
from pdjax.config import ServingConfig
from pdjax.controller.processes import build_processes
from pdjax.engine.worker_process import WorkerProcess
from pdjax.metrics import Report
from pdjax.serving.built import Built
from pdjax.serving.events import Finished, WorkerBack
from pdjax.serving.loop import serve
from pdjax.serving.peers import Message, News, PeerLost
from pdjax.serving.state import ClusterState
from pdjax.workload.arrivals import Listed
from tests.engine.cluster import Impatient, Served, assert_all_is_free
from tests.engine.plain import generate
from tests.tiny import TINY


class Reborn(WorkerProcess):
  """A process that takes over the programs of one before it, where a real one would compile them again."""

  def __init__(self, before: WorkerProcess):
    super().__init__(before._devices)
    self._before = before.engine

  def compile_worker(self, worker):
    worker._compiled = self._before.worker._compiled
    return {}

  def compile_half(self, half):
    halves = [*self._before.senders.values(), *self._before.receivers.values()]
    same = next(one for one in halves if type(one) is type(half) and one.plan('kv') == half.plan('kv'))
    programs = ('_gathers', '_scatters', '_fillers')
    vars(half._end).update({name: found for name, found in vars(same._end).items() if name in programs})
    return {}


class ThreadPeer:
  """A `WorkerProcess` in this process, which a test may kill, and whose news and messages it may change."""

  def __init__(self, name: str, devices: list[jax.Device]):
    self.name = name
    self.devices = devices
    self.process = WorkerProcess(devices)
    self.on_tell: Callable[[Message], Message | None] = lambda message: message
    self.on_news: Callable[[News], tuple[News, ...]] = lambda news: (news,)
    self._killed = threading.Event()

  def ask(self, method: str, *args: Any) -> Any:
    self._check()
    answer = getattr(self.process, method)(*args)
    self._check()
    return answer

  def tell(self, message: Message) -> None:
    changed = self.on_tell(message)
    if changed is not None and not self._killed.is_set():
      self.process.take(changed)

  def listen(self) -> tuple[News, ...]:
    found = self.ask('listen', 0.02)
    return tuple(news for one in found for news in self.on_news(one))

  def restart(self) -> None:
    self.process = Reborn(self.process)
    self._killed.clear()

  def kill(self) -> None:
    """Be gone: what the process still does is not heard of."""
    self._killed.set()

  def close(self) -> None:
    self.process.close()

  def _check(self) -> None:
    if self._killed.is_set():
      time.sleep(0.001)
      raise PeerLost(f'the process of worker {self.name!r} was killed')


@dataclasses.dataclass
class Processes:
  """A cluster over thread peers that serves one set of requests after another."""

  config: ServingConfig
  peers: dict[str, ThreadPeer]
  built: Built
  deadline_s: float = 60.0  # of a run, the return of what was lost included

  @classmethod
  def of(cls, config: ServingConfig) -> 'Processes':
    assert config.model is not None
    devices = iter(jax.devices())
    sizes = {one.name: one.tp for one in config.workers} | {place.name: 1 for place in config.places}
    peers = {name: ThreadPeer(name, [next(devices) for _ in range(tp)]) for name, tp in sizes.items()}
    return cls(config, peers, build_processes(config, config.model, peers))

  def changed(self, **fields) -> 'Processes':
    """The same processes under a config of which some fields differ, such as `faults`."""
    built = dataclasses.replace(self.built, transfer=fields.get('transfer', self.built.transfer))
    return Processes(dataclasses.replace(self.config, **fields), self.peers, built, self.deadline_s)

  def serve(self, requests, prepare: Callable[[], None] = lambda: None, arrivals=None) -> Served:
    """Serve requests; every page and slot is free in the end."""
    requests = tuple(requests)
    built, engine = self.built, self.built.backend
    state = ClusterState(
      self.config.model, built.workers, self.config.page_size, built.transfer, faults=self.config.faults,
      prefix_cache=self.config.cache_of(self.config.model), places=built.places,
      between=[(one.name, other.name) for one, other in self.config.ways((*built.workers, *built.places))],
      cost=self.config.cost,
    )  # fmt: skip
    try:
      engine.start_clock()
      incarnations = {name: worker.incarnation for name, worker in engine.workers.items()}
      for name, incarnation in incarnations.items():
        state.books.places[name].incarnation = incarnation
      prepare()
      policy = self.config.policy
      events = tuple(serve(arrivals or Listed(requests), policy, Impatient(engine, self.deadline_s), state))
      while not all(place.up for place in state.books.places.values()):  # for whoever serves next
        now_s, more = engine.wait(self.deadline_s)
        assert now_s < self.deadline_s and more
        for event in more:
          state.apply(event, now_s)
          events += (event,) if isinstance(event, WorkerBack) else ()
    finally:
      for peer in self.peers.values():
        peer.on_tell, peer.on_news = lambda message: message, lambda news: (news,)
    assert_all_is_free(state)
    report = Report.from_events(events, workers=self.built.workers, places=self.built.places)
    return Served(events, complete(events, has_text=False), report, requests, policy, incarnations, state)


def plain(served, model=TINY) -> dict:
  return {request.id: generate(model, request) for request in served.requests}


def assert_right_or_failed(served) -> list[str]:
  """Every request ended once, with the tokens of a plain loop or with an error; those that failed."""
  ends = collections.Counter(event.request for event in served.events if isinstance(event, Finished))
  assert ends == collections.Counter(request.id for request in served.requests)
  failed = [name for name, one in served.by_id.items() if one.error]
  expected = plain(served)
  assert {name: got for name, got in served.tokens().items() if name not in failed} == {
    name: tokens for name, tokens in expected.items() if name not in failed
  }
  return failed
