"""Logs written by hand, stamp by stamp, and reports of simulated runs."""

import dataclasses

import pytest

import pdjax
from pdjax.metrics import Report
from pdjax.serving.batch import NOBODY
from pdjax.serving.events import Arrived, Delivered, Done, Event, Finished, Result, Started, Turn
from pdjax.serving.orders import Admission, ChunkOrder, Join, StepOrder, TransferOrder
from pdjax.types import PrefixCache
from pdjax.types.request import Request
from pdjax.types.span import Span
from pdjax.workload import Given
from tests import tiny


class Log:
  """Events as the loop yields them, in the order of the calls."""

  def __init__(self):
    self.events: list[Event] = []
    self.requests: dict[str, Request] = {}
    self.tokens: dict[str, tuple[int, ...]] = {}
    self.num_orders = 0
    self.now_s = 0.0

  def turn(self, now_s):
    self.now_s = now_s
    self.events.append(Turn(now_s))

  def arrive(self, name, prompt_len=4, arrival_s=0.0, **fields):
    self.requests[name] = Request(name, prompt=range(prompt_len), arrival_s=arrival_s, **fields)
    self.tokens[name] = ()
    self.events.append(Arrived(self.requests[name]))

  def start(self, order):
    self.events.append(Started(self.now_s, order))
    return order.id

  def step(self, worker, chunks=(), decodes=()):
    """Start a step; chunks are (request, start, length)."""
    self.num_orders += 1
    chunks = tuple(
      ChunkOrder(self.requests[name], start, length, pages={'kv': (0, 1)}, limit=4) for name, start, length in chunks
    )
    joins = tuple(
      Join(
        name, slot, context=4, left=4,
        admission=Admission(self.requests[name], {'kv': (7, 8)}, self.tokens[name], limit=4),
      )
      for slot, name in enumerate(decodes)
    )  # fmt: skip
    batch = NOBODY.changed((), joins)
    return self.start(StepOrder(self.num_orders, worker, chunks, joins, decodes=bool(joins), batch=batch))

  def transfer(self, name, source='p', target='d', pages=(0, 1)):
    self.num_orders += 1
    return self.start(
      TransferOrder(self.num_orders, name, source, target, Span(pages, tuple(p + 7 for p in pages), 0, 4 * len(pages)))
    )

  def done(self, order, began_s, ended_s, brings=None, late=None, **fields):
    """An order ended well; `brings` is how many tokens each request got, `late` how many came after its end."""
    results = []
    for name, count in (brings or {}).items():
      tokens = tuple(100 + len(self.tokens[name]) + i for i in range(count))
      self.tokens[name] += tokens
      results.append(Result(name, tokens))
    too_late = [Result(name, (7,) * count) for name, count in (late or {}).items()]
    self.events.append(Done(order, began_s, ended_s, (*results, *too_late), **fields))
    if results or too_late:
      self.events.append(Delivered(self.now_s, order, tuple(results), tuple(too_late)))

  def finish(self, name, reason='length', error=None):
    self.events.append(Finished(self.now_s, name, reason, self.tokens[name], error))


@dataclasses.dataclass(frozen=True)
class Stamps:
  """One request's way through a prefill worker `p` and a decode worker `d`; every figure is exact in binary."""

  arrival: float = 0.25
  prefill_began: float = 0.5
  prefill_ended: float = 1.0
  first_token: float = 1.0625
  wire_began: float = 1.125
  wire_ended: float = 1.25
  decode_began: float = 1.5
  decode_ended: float = 1.75
  second_token: float = 1.8125
  third_token: float = 2.0625


def write_disaggregated(stamps: Stamps) -> list[Event]:
  log = Log()
  log.turn(stamps.arrival)
  log.arrive('r', arrival_s=stamps.arrival)
  prefill = log.step('p', chunks=[('r', 0, 4)])
  log.turn(stamps.first_token)
  log.done(prefill, stamps.prefill_began, stamps.prefill_ended, {'r': 1})
  transfer = log.transfer('r')
  log.turn(stamps.wire_ended)
  log.done(transfer, stamps.wire_began, stamps.wire_ended, wire_bytes=4096)
  decode = log.step('d', decodes=['r'])
  log.turn(stamps.second_token)
  log.done(decode, stamps.decode_began, stamps.decode_ended, {'r': 1})
  decode = log.step('d', decodes=['r'])
  log.turn(stamps.third_token)
  log.done(decode, stamps.second_token, stamps.third_token, {'r': 1}, wasted_tokens=2)
  log.finish('r')
  return log.events


@pytest.fixture
def log():
  """An empty log to write on."""
  return Log()


@pytest.fixture
def stamps():
  """Stamps of a request that passes through both workers."""
  return Stamps()


@pytest.fixture
def disaggregated():
  """Turns such stamps into a log."""
  return write_disaggregated


@pytest.fixture(scope='session')
def many_requests() -> Report:
  """Ten thousand simulated requests on two prefill workers and one decode worker, more steps than a chart has bars."""
  sizes = {'tp': 4, 'max_sequences': 128, 'max_step_tokens': 2048, 'max_chunks': 32}
  workload = pdjax.Poisson(
    requests_per_s=60, num_requests=10_000, prompt=pdjax.Uniform(20, 400), output=pdjax.Uniform(1, 4)
  )
  config = pdjax.ServingConfig(
    model=pdjax.ModelSpec.llama3_8b(),
    workers=pdjax.prefill_pool(2, **sizes) + pdjax.decode_pool(1, **sizes),
    policy=pdjax.Disaggregated(max_prefill_tokens=2048),
    workload=workload,
    page_size=64,
    dtype='bfloat16',
    cost=pdjax.Roofline(pdjax.ChipSpec.tpu_v5e(), pdjax.LinkSpec(45e9)),
    slo=pdjax.SLO(ttft_ms=40),
  )
  return pdjax.simulate(config).report


@pytest.fixture(scope='session')
def few_requests() -> Report:
  """Six requests on one worker of either role; every step is a bar."""
  return pdjax.simulate(tiny.config(max_sequences=2)).report


@pytest.fixture(scope='session')
def colocated() -> Report:
  """The same six on two colocated workers."""
  return pdjax.simulate(tiny.config('2C')).report


def _chats(seed: int) -> tuple[pdjax.Request, ...]:
  """Requests by twos, of which many begin like others before them."""
  return tuple(
    pdjax.Request(
      f'r{i}', (*tiny.prompt(24, seed)[: 8 * (1 + i % 3)], *tiny.prompt(5, 40 + i)),
      pdjax.SamplingParams(max_tokens=4), i // 2 * 0.001,
    )
    for i in range(24)
  )  # fmt: skip


def _with_hits(split: str, seed: int) -> pdjax.RunResult:
  config = tiny.config(split, workload=Given(_chats(seed)))
  return pdjax.simulate(dataclasses.replace(config, prefix_cache=PrefixCache(block_tokens=4)))


@pytest.fixture(scope='session')
def with_hits() -> pdjax.RunResult:
  """Two dozen requests on two prefill workers and one decode worker, which keep what they have computed."""
  return _with_hits('2P1D', 1)


@pytest.fixture(scope='session')
def colocated_with_hits() -> Report:
  """As many on two colocated workers."""
  return _with_hits('2C', 2).report
