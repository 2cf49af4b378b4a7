r"""The speed of pdjax on a CPU: beside transformers on torch, and beside the least time that it could take.

python -m experiments.bench_cpu
python -m experiments.bench_cpu --rounds=7 --json=cpu.json
python -m experiments.bench_cpu --prefix_cache --rounds=15

Both hold SmolLM2-135M's weights in float32 and have two threads each, and take turns within every round, in processes
of their own, so that neither disturbs the other. pdjax is measured as it serves: requests go through the loop, the
policy and the engine's paged steps, none of them fused, one prefill and one decode worker on one device.
transformers runs a batch of equal prompts, with its own cache and without gradients, and never waits for a request: its
best case. A decode of context 64 runs over the contexts around 64. Tokens are greedy and compared; one more
case, without the peer, draws them from a nucleus of 0.9.

The floor is what the same matrices times rows take by themselves, multiplied by XLA in the better of two ways, and one
reading of the keys and values at the speed at which this machine copies. A ratio above 1 means that pdjax is faster.
Figures are medians of the rounds. Without torch and transformers, or with --peer=none, the comparison is left out.

With --prefix_cache pdjax is measured with a prefix cache against without one instead, where no prompt begins like
another: what the cache costs. Both take turns within every round, the first of one round is the second of the next, and
a ratio is that of two neighbours: of a step, and of the whole run, in which prompts are prefilled, sent and stored too.
"""

import contextlib
import dataclasses
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import app, flags
from rich.console import Console
from rich.table import Table

from experiments.floor import cached_s, copy_bytes_per_s, products_s
from experiments.rows import row, save_rows
from experiments.transformers_peer import TransformersPeer, missing, plain_llama
from pdjax.config import ServingConfig
from pdjax.deployment import Deployment, deploy
from pdjax.opened_model import open_model
from pdjax.policies import Disaggregated
from pdjax.serving import ClusterView
from pdjax.serving.actions import Action
from pdjax.serving.built import Living, Serving
from pdjax.serving.events import Done, Event, Finished, Started
from pdjax.serving.orders import Order, StepOrder
from pdjax.types import ModelSpec, PrefixCache, Request, SamplingParams, decode_pool, prefill_pool
from pdjax.workload import Listed, RandomTokens

_CHECKPOINT = flags.DEFINE_string('checkpoint', 'smollm2', 'Model to serve, as a config takes it; of the Llama family.')
_ROUNDS = flags.DEFINE_integer('rounds', 5, 'Rounds, in each of which every case is measured once.', lower_bound=1)
_STEPS = flags.DEFINE_integer('steps', 32, 'Decode steps of a case in a round.', lower_bound=4)
_THREADS = flags.DEFINE_integer('threads', 2, 'Cores that pdjax has, and threads that torch has.', lower_bound=1)
_ATTENTION = flags.DEFINE_enum('attention', 'sdpa', ['sdpa', 'eager'], 'How transformers computes attention.')
_PEER = flags.DEFINE_enum('peer', 'transformers', ['transformers', 'none'], 'What is measured beside pdjax.')
_CACHE = flags.DEFINE_bool('prefix_cache', False, 'Measure a prefix cache against none, instead of against others.')
_ONLY = flags.DEFINE_string('only', '', 'Measure the cases whose names have this in them.')
_QUICK = flags.DEFINE_bool('quick', False, 'One round of small cases: shows that the command works, measures nothing.')
_JSON = flags.DEFINE_string('json', None, 'Write rows of name, value, unit, peer, ... to this file.')

PAUSE_S = 0.2  # between two measurements: torch's threads spin for a moment after their work


@dataclasses.dataclass(frozen=True)
class Case:
  """A case to measure: prompts of `prompt_len` tokens, and `steps` decode steps after them; none is a prefill.

  Tokens are greedy, or drawn from a nucleus of `top_p` at temperature 1; then there is no peer.
  """

  name: str
  batch: int
  prompt_len: int
  steps: int = 0
  top_p: float | None = None

  @classmethod
  def decode(cls, batch: int, context: int, steps: int, top_p: float | None = None) -> 'Case':
    """Decode steps around a context length."""
    kind = 'decode' if top_p is None else 'sampled'
    return cls(f'{kind} batch {batch} context {context}', batch, max(context - steps // 2, 1), steps, top_p)

  def sampling(self) -> SamplingParams:
    """The sampling of every request."""
    greedy = SamplingParams(max_tokens=self.steps + 1, ignore_eos=True)
    return greedy if self.top_p is None else dataclasses.replace(greedy, temperature=1.0, top_p=self.top_p)

  @property
  def tokens(self) -> int:
    """Tokens of one step."""
    return self.batch if self.steps else self.prompt_len

  @property
  def context(self) -> int:
    """Cached tokens of each sequence, the mean over the steps."""
    return self.prompt_len + self.steps // 2

  def prompts(self, model: ModelSpec) -> list[tuple[int, ...]]:
    """As many prompts."""
    return [tuple(RandomTokens(self.prompt_len, model.vocab_size, i)) for i in range(self.batch)]


@dataclasses.dataclass(frozen=True)
class WholeBatch(Disaggregated):
  """Begins to decode once a decode worker holds `batch` sequences, so that every decode step is a whole batch."""

  batch: int = 1

  def decide(self, view: ClusterView) -> list[Action]:
    actions = super().decide(view)
    if any(len(worker.decodable()) == self.batch for worker in view.decode_workers):
      return actions
    return [action for action in actions if not getattr(action, 'decodes', ())]


class Timed:
  """A backend that notes how long the loop is away from it: what the host spends on a turn."""

  def __init__(self, backend: Serving):
    self._backend = backend
    self.start_clock = backend.start_clock
    self.interrupt = backend.interrupt
    self.close = backend.close
    self._left_s: float | None = None
    self.turn_s: list[float] = []

  @property
  def places(self) -> Mapping[str, Living]:
    """Those of the backend."""
    return self._backend.places

  def submit(self, orders: Sequence[Order]) -> None:
    self._backend.submit(orders)

  def wait(self, until_s: float) -> tuple[float, Sequence[Event]]:
    if self._left_s is not None:
      self.turn_s.append(time.perf_counter() - self._left_s)
    answer = self._backend.wait(until_s)
    self._left_s = time.perf_counter()
    return answer


@dataclasses.dataclass(frozen=True)
class Measured:
  """Seconds of a step and of the whole run, the host's share of a step, and the tokens that came, by prompt."""

  step_s: float
  run_s: float
  host_share: float
  tokens: list[tuple[int, ...]]


def measure(deployment: Deployment, case: Case, prompts: Sequence[tuple[int, ...]]) -> Measured:
  """Serve a case's prompts through the loop; a prefill counts from its arrival to its token."""
  requests = [Request(str(i), prompt, case.sampling()) for i, prompt in enumerate(prompts)]
  backend = Timed(deployment.built.backend)
  config = dataclasses.replace(deployment.config, policy=WholeBatch(batch=case.batch))
  timed = dataclasses.replace(deployment, config=config, built=dataclasses.replace(deployment.built, backend=backend))
  tokens: dict[str, tuple[int, ...]] = {}
  steps: set[int] = set()
  ends_s: list[float] = []
  run_s = 0.0
  for event in timed.serve(Listed(requests)):
    match event:
      case Started(order=StepOrder(id=order, batch=batch)) if len(batch) == case.batch or not case.steps:
        steps.add(order)
      case Done(order=order, ended_s=ended_s) if order in steps:
        ends_s.append(ended_s)
      case Finished(now_s=run_s, request=request, tokens=all_tokens):
        tokens[request] = all_tokens
  if not case.steps:
    return Measured(ends_s[-1], run_s, 0.0, [tokens[request.id] for request in requests])
  step_s = (ends_s[-1] - ends_s[0]) / (len(ends_s) - 1)
  host_s = statistics.median(backend.turn_s[-case.steps :])
  return Measured(step_s, run_s, host_s / step_s, [tokens[request.id] for request in requests])


def floor_s(model: ModelSpec, case: Case, copy_speed: float, repeats: int) -> float:
  """The least seconds of a step: its products, in the quickest way known here, and its keys and values read once."""
  cached = cached_s(model, case.batch * case.context, copy_speed)
  return products_s(model, case.tokens, case.batch, repeats) + cached


# ---------------------------------------------------------------------------- the command


def cases(quick: bool, steps: int) -> list[Case]:
  """The cases to measure."""
  if quick:
    return [Case('prefill 32', 1, 32), Case.decode(2, 16, 8), Case.decode(2, 16, 8, top_p=0.9)]
  return [
    Case('prefill 512', 1, 512),
    Case.decode(1, 64, steps),
    Case.decode(32, 64, steps),
    Case.decode(32, 512, steps),
    Case.decode(32, 64, steps, top_p=0.9),
  ]


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments {argv[1:]}; options begin with --.')
  console = Console(highlight=False)
  _keep_cores(_THREADS.value)
  measured = [case for case in cases(_QUICK.value, _STEPS.value) if _ONLY.value in case.name]
  if not measured:
    names = ', '.join(case.name for case in cases(_QUICK.value, _STEPS.value))
    raise app.UsageError(f'--only={_ONLY.value} is in no name of a case; they are {names}.')
  rounds = 1 if _QUICK.value else _ROUNDS.value
  config = _config(measured)
  opened = open_model(config)
  model = opened.model
  if _CACHE.value:
    with contextlib.closing(deploy(config, opened)) as deployment:
      _measure_cache(console, deployment, measured, rounds)
    return
  peer = None
  if _PEER.value == 'transformers':
    if not plain_llama(model):
      raise app.UsageError(
        f'{model.name} is no plain Llama, which is all that transformers is measured on; add --peer=none.'
      )
    if packages := missing():
      text = f'{" and ".join(packages)} not installed: nothing to compare with (pip install "pdjax[peers]").'
      console.print(text, markup=False)
    else:
      peer = TransformersPeer(_CHECKPOINT.value, _THREADS.value, _ATTENTION.value)
  deployment = deploy(config, opened)
  ours: dict[str, list[Measured]] = {case.name: [] for case in measured}
  theirs: dict[str, list[float]] = {case.name: [] for case in measured}
  floors: dict[str, list[float]] = {case.name: [] for case in measured}
  agreeing = compared = 0
  for index in range(rounds):
    for case in measured:
      prompts = case.prompts(model)
      ours[case.name].append(measure(deployment, case, prompts))
      floors[case.name].append(floor_s(model, case, copy_bytes_per_s(_THREADS.value), 3 if _QUICK.value else 7))
      if peer is None or case.top_p is not None:
        continue
      time.sleep(PAUSE_S)
      answer = peer.generate(prompts, case.steps)
      theirs[case.name].append(answer.step_s if case.steps else answer.prefill_s)
      time.sleep(PAUSE_S)
      if index == 0:
        pairs = zip(ours[case.name][0].tokens, answer.tokens, strict=True)
        agreeing += sum(mine == tuple(other) for mine, other in pairs)
        compared += case.batch
  if peer is not None:
    peer.close()
  deployment.close()

  rows = []
  for case in measured:
    step_s = statistics.median(one.step_s for one in ours[case.name])
    other = theirs[case.name]
    rows.append(
      row(
        case.name, case.tokens / step_s, 'tokens/s',
        peer='transformers' if other else None, peer_value=case.tokens / statistics.median(other) if other else None,
        floor_share=statistics.median(floors[case.name]) / step_s,
      )
    )  # fmt: skip
  greedy = [case for case in measured if case.steps and not case.top_p]
  if greedy:
    largest = max(greedy, key=lambda case: (case.batch, -case.context))
    share = statistics.median(one.host_share for one in ours[largest.name])
    rows.append(row(f'host loop, share of {largest.name}', 100 * share, '%'))
  _print(console, rows, peer, f'{agreeing} of {compared}')
  save_rows(_JSON.value, rows)


def _measure_cache(console: Console, off: Deployment, measured: Sequence[Case], rounds: int) -> None:
  """Measure every case with a prefix cache and without one, in turns; print, and save rows."""
  on = dataclasses.replace(off, config=dataclasses.replace(off.config, prefix_cache=PrefixCache()))
  pairs: dict[str, list[tuple[Measured, Measured]]] = {case.name: [] for case in measured}
  for index in range(rounds):
    for case in measured:
      prompts = case.prompts(off.opened.model)
      if index == 0:
        measure(off, case, prompts)  # whoever comes first touches memory that nobody has touched
      sides = (on, off) if index % 2 == 0 else (off, on)
      found = [measure(side, case, prompts) for side in sides]
      with_cache, without = found if index % 2 == 0 else found[::-1]
      if with_cache.tokens != without.tokens:
        raise RuntimeError(f'{case.name} has other tokens with a prefix cache than without.')
      pairs[case.name].append((with_cache, without))
  table = Table(
    title=f'{_CHECKPOINT.value} with a prefix cache against without, where nothing repeats, {rounds} rounds'
  )
  table.add_column('case', no_wrap=True)
  for column in ('on, tokens/s', 'off, tokens/s', 'ratio of a step', 'ratio of a run'):
    table.add_column(column, justify='right')
  rows, of_runs = [], []
  for case in measured:
    ours, theirs = (case.tokens / statistics.median(one[side].step_s for one in pairs[case.name]) for side in (0, 1))
    steps = [without.step_s / with_cache.step_s for with_cache, without in pairs[case.name]]
    runs = [without.run_s / with_cache.run_s for with_cache, without in pairs[case.name]]
    of_runs += runs
    table.add_row(case.name, f'{ours:,.1f}', f'{theirs:,.1f}', _spread(steps), _spread(runs))
    rows.append(row(case.name, ours, 'tokens/s', peer='without a cache', peer_value=theirs))
    for what, ratios in (('steps', steps), ('runs', runs)):
      rows.append(row(f'median of the ratios, {what}, {case.name}', statistics.median(ratios), 'times'))
  rows.append(row('median of the ratios, all runs', statistics.median(of_runs), 'times'))
  console.print(table)
  console.print(f'all runs: {_spread(of_runs)}; above 1 the cache is faster; in brackets the middle half')
  save_rows(_JSON.value, rows)


def _spread(ratios: Sequence[float]) -> str:
  """The median of ratios, and between which the middle half of them is."""
  low, middle, high = statistics.quantiles(ratios if len(ratios) > 1 else [*ratios, *ratios], n=4, method='inclusive')
  return f'{middle:.3f} ({low:.3f} to {high:.3f})'


def _keep_cores(threads: int) -> None:
  """Run on as many cores; XLA, which has not started yet, makes as many threads."""
  if not hasattr(os, 'sched_setaffinity'):
    raise app.UsageError(
      'this system cannot keep a process on some cores, which is how XLA gets its threads; use Linux.'
    )
  cores = sorted(os.sched_getaffinity(0))
  if len(cores) < threads:
    raise app.UsageError(f'--threads is {threads}, but this process has {len(cores)} cores; lower it.')
  os.sched_setaffinity(0, cores[:threads])


def _config(measured: Sequence[Case]) -> ServingConfig:
  """One prefill and one decode worker on one device, with room for every case."""
  batch = max(case.batch for case in measured)
  longest = max(case.prompt_len for case in measured)
  pages = sum(-(-(case.prompt_len + case.steps + 1) // 16) for case in measured) * batch
  place: dict[str, Any] = {'num_pages': pages, 'devices': (0,)}
  return ServingConfig(
    checkpoint=_CHECKPOINT.value,
    workers=prefill_pool(1, max_step_tokens=longest, **place) + decode_pool(1, max_sequences=batch, **place),
    platform='cpu',
    prefix_cache=None,  # rounds ask the same again
  )


def _print(console: Console, rows: Sequence[dict[str, Any]], peer: TransformersPeer | None, agreement: str) -> None:
  versions = f'jax {jax.__version__}' + (f', {peer.version}' if peer else '')
  table = Table(title=f'{_CHECKPOINT.value} in float32 on {_THREADS.value} cores, tokens/s: {versions}')
  table.add_column('case', no_wrap=True)
  for column in ('pdjax', 'transformers', 'ratio', 'floor share'):
    table.add_column(column, justify='right')
  for one in [one for one in rows if one['unit'] != '%']:
    ratio, other = one['ratio'], one['peer_value']
    table.add_row(
      one['name'],
      f'{one["value"]:,.1f}',
      '' if other is None else f'{other:,.1f}',
      '' if ratio is None else f'{ratio:.2f}',
      f'{one["floor_share"]:.2f}',
    )
  console.print(table)
  for one in [one for one in rows if one['unit'] == '%']:
    console.print(f'{one["name"]}: {one["value"]:.1f} %')
  if peer:
    console.print(f'greedy tokens equal in {agreement} sequences')


if __name__ == '__main__':
  app.run(main)
