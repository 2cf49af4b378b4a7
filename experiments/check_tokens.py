r"""Checks that every way of serving SmolLM2 gives the tokens of an independent implementation, token for token.

python -m experiments.check_tokens
python -m experiments.check_tokens --ways=plain,2P2D --page_sizes=16
python -m experiments.check_tokens --platform=gpu

The cases and where they come from are in tests/data. All prompts are in flight together. On fewer than four devices all
workers share the first, with tp=1. Prints a line a run; the exit status is 1 if any token differs.
"""

import dataclasses
import json
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
from absl import app, flags
from rich.console import Console

from pdjax.config import ServingConfig
from pdjax.engine.build import prepare_devices
from pdjax.launch import run
from pdjax.model.checkpoint import open_checkpoint
from pdjax.model.plain import PlainLoop
from pdjax.model.weights import load_weights
from pdjax.policies import Colocated, Disaggregated
from pdjax.serving import Action, ClusterView, Policy, SwitchRole
from pdjax.sharding import make_mesh
from pdjax.types import (
  Request,
  Role,
  SamplingParams,
  TransferSpec,
  WorkerSpec,
  colocated_pool,
  decode_pool,
  prefill_pool,
)
from pdjax.workload import Given

GOLDEN = pathlib.Path(__file__).resolve().parents[1] / 'tests' / 'data' / 'smollm2_greedy.json'

POOL_TOKENS = 4096
MAX_CONTEXT = 1024
SIZES = {'max_step_tokens': 32}

WIDEST = 4  # devices of the widest way

_Way = tuple[tuple[WorkerSpec, ...], Policy, TransferSpec]

_WAYS = flags.DEFINE_list('ways', None, 'Ways of serving to check; all by default.')
_PAGE_SIZES = flags.DEFINE_list('page_sizes', ['1', '16', '64'], 'Tokens per page.')
_PLATFORM = flags.DEFINE_enum('platform', 'cpu', ['cpu', 'gpu', 'tpu'], 'Devices to serve on.')
_CACHE = flags.DEFINE_string('compilation_cache', None, 'Folder that keeps compiled programs from run to run.')


@dataclasses.dataclass(frozen=True)
class InTurns(Disaggregated):
  """As it is, while one of three workers changes sides whenever two more requests have ended."""

  def decide(self, view: ClusterView) -> list[Action]:
    turn = len(view.requests) // 2  # all come at once
    role, sides = (Role.PREFILL, view.decode_workers) if turn % 2 else (Role.DECODE, view.prefill_workers)
    if len(sides) == 2 and not any(worker.draining for worker in view.workers.values()):
      return [SwitchRole(sides[turn // 2 % 2].name, role)]
    return super().decide(view)


def golden_cases() -> list[dict]:
  """Prompts and what must follow them: `prompt_ids` and `greedy_ids`."""
  return json.loads(GOLDEN.read_text(encoding='utf-8'))['cases']


def ways(page_size: int) -> dict[str, _Way]:
  """Every way of serving by name, with as many pages of that size as the cases need."""
  sizes = SIZES | {'num_pages': POOL_TOKENS // page_size}
  larger = sizes | {'page_size': 4 * page_size, 'num_pages': POOL_TOKENS // page_size // 4}
  either = sizes | {'may_become': (Role.PREFILL, Role.DECODE)}
  default, apart, four = TransferSpec(), Disaggregated(), Disaggregated(decode_steps=4)
  layers = TransferSpec(granularity='layers', piece_bytes=2**20)
  staged = TransferSpec('host_staged', granularity='request')
  return {
    'colocated': (colocated_pool(1, **sizes), Colocated(token_budget=128), default),
    'colocated tp3': (colocated_pool(1, tp=3, **sizes), Colocated(token_budget=128, decode_steps=4), default),
    '1P1D tp1→tp3': (prefill_pool(1, tp=1, **sizes) + decode_pool(1, tp=3, **sizes), apart, layers),
    '1P1D tp3→tp1': (prefill_pool(1, tp=3, **sizes) + decode_pool(1, tp=1, **sizes), four, staged),
    '1P1D pages ×4': (prefill_pool(1, **sizes) + decode_pool(1, tp=3, **larger), apart, staged),
    '1P1D pages ÷4': (prefill_pool(1, tp=3, **larger) + decode_pool(1, **sizes), apart, layers),
    '2P2D': (prefill_pool(2, **sizes) + decode_pool(2, **sizes), apart, default),
    '1P2D in turns': (prefill_pool(1, **either) + decode_pool(2, **either), InTurns(), default),
  }


def on_one_device(workers: tuple[WorkerSpec, ...]) -> tuple[WorkerSpec, ...]:
  """The same workers, all on the first device."""
  return tuple(dataclasses.replace(worker, tp=1, devices=(0,)) for worker in workers)


def serve_golden(
  name: str, page_size: int, cache: str | None = None, platform: str = 'cpu', one_device: bool = False
) -> dict[int, tuple[int, ...]]:
  """The cases, by number, whose tokens differ when all are served together: what came instead."""
  workers, policy, transfer = ways(page_size)[name]
  if one_device:
    workers = on_one_device(workers)
  cases = golden_cases()
  requests = tuple(
    Request(str(i), tuple(case['prompt_ids']), SamplingParams(max_tokens=len(case['greedy_ids'])))
    for i, case in enumerate(cases)
  )
  config = ServingConfig(
    checkpoint='smollm2',
    workers=workers,
    policy=policy,
    transfer=transfer,
    workload=Given(requests),
    page_size=page_size,
    max_context=MAX_CONTEXT,
    platform=platform,
    compilation_cache=cache,
  )
  tokens = {int(one.request.id): one.token_ids for one in run(config).completions}
  return {i: tokens[i] for i, case in enumerate(cases) if tokens[i] != tuple(case['greedy_ids'])}


def plain_golden(platform: str = 'cpu') -> dict[int, tuple[int, ...]]:
  """The same by a plain loop, one case after another."""
  checkpoint = open_checkpoint('smollm2')
  (device, *_) = prepare_devices(platform, 1)
  mesh = make_mesh(checkpoint.spec, [device])
  weights = load_weights(checkpoint, checkpoint.spec, {'plain': mesh}, jnp.dtype('float32'))['plain']
  loop = PlainLoop(checkpoint.spec, weights, MAX_CONTEXT)
  differing = {}
  for i, case in enumerate(golden_cases()):
    tokens = tuple(loop.generate(case['prompt_ids'], len(case['greedy_ids'])))
    if tokens != tuple(case['greedy_ids']):
      differing[i] = tokens
  return differing


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments {argv[1:]}; options begin with --.')
  if not all(size.isdigit() and int(size) for size in _PAGE_SIZES.value):
    raise app.UsageError(f'--page_sizes is {_PAGE_SIZES.value}, expected positive counts of tokens, e.g. 1,16,64.')
  known = ['plain', *ways(16)]
  wanted = _WAYS.value or known
  if unknown := set(wanted) - set(known):
    raise app.UsageError(f'unknown ways {sorted(unknown)}; there are {", ".join(known)}.')
  one_device = len(prepare_devices(_PLATFORM.value, WIDEST)) < WIDEST
  console = Console(highlight=False)
  failed = 0
  for name in wanted:
    for page_size in [0] if name == 'plain' else map(int, _PAGE_SIZES.value):
      begin = time.perf_counter()
      if name == 'plain':
        differing = plain_golden(_PLATFORM.value)
      else:
        differing = serve_golden(name, page_size, _CACHE.value, _PLATFORM.value, one_device)
      failed += bool(differing)
      where = ', all on one device' if one_device and name != 'plain' else ''
      verdict = f'[red]{len(differing)} differ: {differing}[/]' if differing else '[green]all equal[/]'
      pages = '' if name == 'plain' else f', page size {page_size}'
      seconds = time.perf_counter() - begin
      console.print(f'{name}{where}{pages}: {len(golden_cases())} cases, {verdict}, {seconds:.0f} s')
      jax.clear_caches()
  sys.exit(1 if failed else 0)


if __name__ == '__main__':
  app.run(main)
