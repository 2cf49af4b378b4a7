r"""The place where turns are prefilled, by fixed rules and by one that looks at queues: two kinds of traffic and load.

python -m experiments.deciders
python -m experiments.deciders --splits=1P1D,2P2D --loads=0.5,1.1 --chats=60 --json=deciders.json

Llama 3 70B on simulated H100 chips, tensor parallel over 8; decode workers may prefill too. Chats begin with a system
prompt that all share, and each turn adds to what was said. A load of 1 is as many turns a second as the prefill workers
alone could compute if nothing but the beginning of each turn were cached. The card is F14: llm-d and BLIS, 2026-06-05,
where a threshold of 16 uncached tokens sends every turn of code generation to prefill.
"""

import dataclasses
import sys
from typing import Any

from absl import app, flags
from rich.console import Console
from rich.table import Table

from experiments.rows import row, save_rows
from pdjax import launch
from pdjax.config import ServingConfig
from pdjax.cost import Roofline
from pdjax.metrics import Report
from pdjax.policies import (
  AlwaysLocal,
  AlwaysRemote,
  Decider,
  Disaggregated,
  SoonestFirstToken,
  StickyPrefix,
  UncachedThreshold,
)
from pdjax.types import ChipSpec, LinkSpec, ModelSpec, PrefixCache, Role, WorkerSpec, parse_split, prefill_pool
from pdjax.workload import Fixed, MultiTurn

_SPLITS = flags.DEFINE_list('splits', ['1P1D', '2P2D'], 'Prefill workers and workers that decode.')
_LOADS = flags.DEFINE_list('loads', ['0.5', '1.1'], 'Shares of what the prefill workers could compute.')
_CHATS = flags.DEFINE_integer('chats', 60, 'Chats of each pair of workers.', lower_bound=2)
_SEED = flags.DEFINE_integer('seed', 0, 'Seed of the traffic.', lower_bound=0)
_JSON = flags.DEFINE_string('json', None, 'Write rows of name, value, unit to this file.')

_MODEL = dataclasses.replace(ModelSpec.llama3_70b(), context_len=131_072)
_COST = Roofline(
  ChipSpec.h100(), LinkSpec(50e9, 0.001, 'a NIC of 400 Gb/s for each GPU, as in ai-dynamo/aiconfigurator'), 2
)
_STEP_TOKENS = 2048
RULES: dict[str, Decider] = {
  'always local': AlwaysLocal(),
  'always remote': AlwaysRemote(),
  'threshold 16': UncachedThreshold(16),
  'threshold 512': UncachedThreshold(512),
  'threshold 4096': UncachedThreshold(4096),
  'decider': SoonestFirstToken(),
}


@dataclasses.dataclass(frozen=True)
class Traffic:
  """Chats of one kind.

  Attributes:
    shared: Tokens with which all begin.
    new: Tokens that each turn adds.
    turns: Turns of a chat.
    output: Tokens of an answer.
    card: The order of the card, by whether prefill is saturated.
  """

  shared: int
  new: int
  turns: int
  output: int
  card: dict[bool, str]


TRAFFIC = {
  'code': Traffic(30_000, 1500, 15, 64, {
    True: 'always local < decider << threshold 16', False: 'threshold 16 <= always local',
  }),
  'chat': Traffic(5_000, 50, 4, 64, {
    True: 'always local < decider << threshold 16', False: 'threshold 16 <= always local',
  }),
}  # fmt: skip


def turn_seconds(traffic: Traffic, worker: WorkerSpec) -> float:
  """Seconds that a prefill worker computes for the mean turn of a chat, the beginning cached."""
  behind = traffic.shared + traffic.turns // 2 * (traffic.new + traffic.output)
  return _COST.step_seconds(_MODEL, worker, [(behind, traffic.new)], (), 1)


def config_of(split: str, traffic: Traffic, load: float, rule: Decider) -> ServingConfig:
  """The run of a cell."""
  num_prefill, num_decode = parse_split(split)
  sizes: dict[str, Any] = {
    'tp': 8,
    'max_step_tokens': _STEP_TOKENS,
    'max_chunks': 32,
    'max_sequences': 128,
    'num_pages': 20_000,
  }
  prefill = prefill_pool(num_prefill, **sizes)
  decode = tuple(WorkerSpec(f'decode{number}', Role.BOTH, **sizes) for number in range(num_decode))
  rate = load * num_prefill / turn_seconds(traffic, prefill[0]) / traffic.turns
  return ServingConfig(
    model=_MODEL,
    workers=prefill + decode,
    policy=Disaggregated(
      _STEP_TOKENS, place_prefill=StickyPrefix(), place_decode=StickyPrefix(), decider=rule, moves_on=True
    ),
    workload=MultiTurn(
      num_chats=_CHATS.value * num_prefill,
      shared=traffic.shared,
      prompt=Fixed(traffic.new),
      user=Fixed(traffic.new),
      output=Fixed(traffic.output),
      turns=Fixed(traffic.turns),
      max_concurrency=None,
      chats_per_s=rate,
      seed=_SEED.value,
    ),
    prefix_cache=PrefixCache(block_tokens=64),
    page_size=64,
    dtype='bfloat16',
    cost=_COST,
  )


def serve(config: ServingConfig) -> Report:
  """The report of a simulation whose requests were all served."""
  report = launch.simulate(config, keep_events=False).report
  if report.failed:
    raise RuntimeError(f'{report.failed} of {report.num_prompts} requests failed: {report.notes}')
  return report


def main(_):
  console = Console(width=160)
  rows = []
  for kind, traffic in TRAFFIC.items():
    for split in _SPLITS.value:
      for load in map(float, _LOADS.value):
        cell = f'{kind}, {split}, {load:.0%} of prefill'
        reports = {name: serve(config_of(split, traffic, load, rule)) for name, rule in RULES.items()}
        ttft = {name: report.ttft.mean_ms or 0.0 for name, report in reports.items()}
        table = Table(title=f'{cell}: {reports["decider"].num_prompts} turns')
        for column in ('rule', 'mean TTFT ms', 'queue ms', 'prefill ms', 'p99 TTFT ms', 'mean TPOT ms', 'computed'):
          table.add_column(column, justify='left' if column == 'rule' else 'right')
        for name, report in reports.items():
          account = report.account
          computed = 1 - report.cached_tokens / report.total_input_tokens
          table.add_row(
            name, f'{ttft[name]:.1f}', f'{account.queue_ms:.1f}', f'{account.prefill_ms:.1f}',
            f'{report.ttft.p99_ms:.1f}', f'{report.tpot.mean_ms:.1f}', f'{computed:.1%}',
          )  # fmt: skip
          rows.append(row(f'mean TTFT, {cell}, {name}', ttft[name], 'ms'))
        console.print(table)
        fixed = {name: value for name, value in ttft.items() if name != 'decider'}
        console.print(f'here: {" < ".join(sorted(ttft, key=lambda name: ttft[name]))}')
        console.print(f'card: {traffic.card[load > 1]}')
        console.print(
          f'decider: {ttft["decider"] / min(fixed.values()):.2f} times the best fixed rule, '
          f'{max(fixed.values()) / ttft["decider"]:.1f} times better than the worst'
        )
        rows.append(row(f'decider over the best fixed rule, {cell}', ttft['decider'] / min(fixed.values()), 'times'))
  if _JSON.value:
    save_rows(_JSON.value, rows)


if __name__ == '__main__':
  sys.exit(app.run(main))
