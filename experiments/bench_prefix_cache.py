r"""The prefix cache on devices: requests a second where prompts begin alike, and TTFT of second turns, on against off.

python -m experiments.bench_prefix_cache
python -m experiments.bench_prefix_cache --requests=24 --repeats=3 --json=prefix.json

SmolLM2 on one prefill worker and one decode worker of this machine, compiled once; runs with and without the cache take
turns. First `--users` users in a closed loop, whose prompts share their first tokens. Then chats of two turns, one
after another on an idle cluster: the second turn's prompt is the first with its answer and something new.
"""

import dataclasses
import statistics

import numpy as np
from absl import app, flags
from rich.console import Console
from rich.table import Table

from experiments.rows import row, save_rows
from pdjax.config import ServingConfig
from pdjax.deployment import Deployment, deploy
from pdjax.metrics import Report
from pdjax.opened_model import open_model
from pdjax.policies import Disaggregated
from pdjax.serving.loop import Arrivals
from pdjax.types import PrefixCache, Request, SamplingParams, decode_pool, prefill_pool
from pdjax.workload import Chat, Chats, ChatTurn, ClosedLoop

_REQUESTS = flags.DEFINE_integer('requests', 16, 'Requests of a closed loop.', lower_bound=2)
_USERS = flags.DEFINE_integer('users', 8, 'Users of the closed loop.', lower_bound=1)
_PROMPT = flags.DEFINE_integer('prompt', 1000, 'Tokens of its prompts.', lower_bound=2)
_SHARED = flags.DEFINE_integer('shared', 900, 'Tokens that they share.', lower_bound=1)
_OUTPUT = flags.DEFINE_integer('output', 16, 'Tokens of its answers.', lower_bound=1)
_TURN = flags.DEFINE_integer('turn', 512, "Tokens of a chat's first prompt.", lower_bound=1)
_REPEATS = flags.DEFINE_integer('repeats', 3, 'Runs of each kind, in turns, of which the medians count.', lower_bound=1)
_JSON = flags.DEFINE_string('json', None, 'Write rows of name, value, unit to this file.')

_ADDED = 32  # tokens that a second turn adds


def tokens(count: int, seed: int) -> tuple[int, ...]:
  """Random token ids."""
  return tuple(np.random.default_rng(seed).integers(100, 40_000, count).tolist())


def serve(deployment: Deployment, arrivals: Arrivals) -> Report:
  """The report of a run whose requests were all served."""
  report = Report.from_events(deployment.serve(arrivals), workers=deployment.built.workers)
  if report.failed:
    raise RuntimeError(f'{report.failed} of {report.num_prompts} requests failed; see that the workers have the pages.')
  return report


def closed_loop(seed: int) -> Arrivals:
  """Users whose prompts share their first tokens."""
  system = tokens(_SHARED.value, seed)
  sampling = SamplingParams(max_tokens=_OUTPUT.value, ignore_eos=True)
  requests = [
    Request(f'r{number}', (*system, *tokens(_PROMPT.value - _SHARED.value, 1000 * seed + number)), sampling)
    for number in range(_REQUESTS.value)
  ]
  return ClosedLoop(requests, _USERS.value)


def chats(seed: int, count: int = 3) -> Arrivals:
  """Chats of two turns, one after another."""
  sampling = SamplingParams(max_tokens=_OUTPUT.value, ignore_eos=True)
  found = [
    Chat(
      f'chat-{number}',
      (
        ChatTurn(tokens(_TURN.value, 10_000 * seed + number), sampling),
        ChatTurn(tokens(_ADDED, 10_000 * seed + 100 + number), sampling),
      ),
    )
    for number in range(count)
  ]
  return Chats(found, max_context=_TURN.value + 2 * _OUTPUT.value + _ADDED, max_concurrency=1)


def second_turns(report: Report) -> float:
  """The median TTFT of second turns, in seconds."""
  found = [one.ttft_s for one in report.timeline.requests if one.id.endswith('turn-1')]
  return statistics.median(ttft_s for ttft_s in found if ttft_s is not None)


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments {argv[1:]}; options begin with --.')
  if _SHARED.value >= _PROMPT.value:
    raise app.UsageError(f'--shared={_SHARED.value}, expected fewer than the {_PROMPT.value} tokens of --prompt.')
  sizes = {'num_pages': 1024, 'max_sequences': max(_USERS.value, 1), 'max_step_tokens': 1024}
  config = ServingConfig(
    workers=prefill_pool(1, **sizes) + decode_pool(1, **sizes), checkpoint='smollm2', max_context=2048,
    policy=Disaggregated(max_prefill_tokens=1024), compilation_cache='off', prefix_cache=None,
  )  # fmt: skip
  console = Console()
  off = deploy(config, open_model(config), say=console.print)
  on = dataclasses.replace(off, config=dataclasses.replace(config, prefix_cache=PrefixCache()))
  rates: list[tuple[float, float]] = []
  turns: list[tuple[float, float]] = []
  try:
    for seed in range(_REPEATS.value):
      loops = [serve(one, closed_loop(seed)) for one in (on, off)]
      rates.append((loops[0].request_throughput or 0.0, loops[1].request_throughput or 0.0))
      turns.append((second_turns(talk := serve(on, chats(seed))), second_turns(serve(off, chats(seed)))))
  finally:
    off.close()
  second = _TURN.value + _OUTPUT.value + _ADDED
  share = talk.cached_tokens / 3 / second
  falls = statistics.median(1 - ours / theirs for ours, theirs in turns)
  table = Table(title='SmolLM2, 1P1D, the prefix cache on against off')
  for column in ('figure', 'on', 'off', 'ratio'):
    table.add_column(column, justify='left' if column == 'figure' else 'right')
  ours, theirs = (statistics.median(one[side] for one in rates) for side in (0, 1))
  ratio = statistics.median(one / other for one, other in rates)
  shared = f'{_SHARED.value} of {_PROMPT.value} shared'
  table.add_row(f'requests a second, {shared}', f'{ours:.3f}', f'{theirs:.3f}', f'{ratio:.2f}')
  rows = [row(f'requests a second, {shared}', ours, '1/s', peer='off', peer_value=theirs)]
  ours, theirs = (1e3 * statistics.median(one[side] for one in turns) for side in (0, 1))
  table.add_row(f'TTFT of second turns of {second} tokens, ms', f'{ours:.0f}', f'{theirs:.0f}', f'{ours / theirs:.2f}')
  table.add_row(
    'by which it falls, and the share that is cached', f'{falls:.2f}', f'{share:.2f}', f'{falls / share:.2f}'
  )
  rows.append(row('TTFT of second turns falls by', falls, 'share', peer='the share that is cached', peer_value=share))
  console.print(table)
  save_rows(_JSON.value, rows)


if __name__ == '__main__':
  app.run(main)
