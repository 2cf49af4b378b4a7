r"""The cost of handing a prompt over: whole, chunk by chunk, layer by layer, and beside a colocated worker.

python -m experiments.bench_handoff
python -m experiments.bench_handoff --prompt_len=256 --rounds=9 --json=handoff.json
python -m experiments.bench_handoff --checkpoint=random --ways=auto

One request at a time, SmolLM2-135M in float32, one prefill and one decode worker of one device each (of the same, where
there is but one), and a colocated worker with the same chunks. Every way takes its turn within every round; figures are
medians of the rounds.

* exposed: from the end of the prompt's last step until the decode worker has all of it (ms; 0 if it has it before)
* hidden: the share of wire time, pieces ready to arrived, in which the source computed the prompt
* second token: from arrival to the second token (ms), and its ratio to that of the colocated worker
"""

import dataclasses
import math
import statistics
from typing import Any

from absl import app, flags
from rich.console import Console
from rich.table import Table

from experiments.few_buckets import with_few_buckets
from experiments.rows import row, save_rows
from pdjax.config import ServingConfig
from pdjax.deployment import Deployment, deploy
from pdjax.engine.build import prepare_devices
from pdjax.metrics import Report
from pdjax.opened_model import open_model
from pdjax.policies import Colocated, Disaggregated
from pdjax.serving import Policy
from pdjax.serving.events import Finished
from pdjax.types import (
  ModelSpec,
  Request,
  SamplingParams,
  TransferSpec,
  WorkerSpec,
  colocated_pool,
  decode_pool,
  prefill_pool,
)
from pdjax.types.transfer import GranularityName
from pdjax.workload import Listed, RandomTokens

_CHECKPOINT = flags.DEFINE_string(
  'checkpoint', 'smollm2', "Model to serve, as a config takes it; 'random' has SmolLM2's shape."
)
_PROMPT_LEN = flags.DEFINE_integer('prompt_len', 1024, 'Tokens of a prompt.', lower_bound=1)
_CHUNK = flags.DEFINE_integer('chunk', 256, 'Tokens of a chunk.', lower_bound=1)
_ROUNDS = flags.DEFINE_integer('rounds', 7, 'Rounds, in each of which every way takes its turn.', lower_bound=1)
_WAYS = flags.DEFINE_list('ways', None, 'Granularities to measure beside colocated; all by default.')
_TRANSPORT = flags.DEFINE_enum('transport', 'device_put', ['device_put', 'host_staged'], 'How KV travels.')
_LAYER_GROUPS = flags.DEFINE_integer(
  'layer_groups', None, 'Groups of layers; by default what a TransferSpec takes.', lower_bound=1
)
_PLATFORM = flags.DEFINE_enum('platform', 'cpu', ['cpu', 'gpu', 'tpu'], 'Devices to serve on.')
_CACHE = flags.DEFINE_string('compilation_cache', None, 'Folder that keeps compiled programs from run to run.')
_JSON = flags.DEFINE_string('json', None, 'Write rows of name, value, unit, peer, ... to this file.')

GRANULARITIES: tuple[GranularityName, ...] = ('request', 'chunk', 'layers', 'auto')
COLOCATED, WHOLE, AUTO = 'colocated', 'request', 'auto'
OUTPUT_LEN = 8


@dataclasses.dataclass(frozen=True)
class HandOff:
  """One prompt's way: seconds, the share of wire time that was hidden, and the tokens it got."""

  second_token_s: float
  exposed_s: float = 0.0
  hidden: float = 0.0
  tokens: tuple[int, ...] = ()


class Served:
  """A deployed cluster that answers one prompt at a time."""

  def __init__(self, workers: tuple[WorkerSpec, ...], policy: Policy, transfer: TransferSpec):
    config = ServingConfig(
      checkpoint=_CHECKPOINT.value,
      model=ModelSpec.smollm2_135m() if _CHECKPOINT.value == 'random' else None,
      # Whole chunks are of one size, for which alone steps are compiled then.
      workers=workers if _PROMPT_LEN.value % _CHUNK.value else with_few_buckets(workers, (1,)),
      policy=policy,
      transfer=transfer,
      max_context=_PROMPT_LEN.value + OUTPUT_LEN,
      platform=_PLATFORM.value,
      compilation_cache=_CACHE.value,
      prefix_cache=None,  # rounds ask the same again
    )
    self._deployment: Deployment = deploy(config, open_model(config))
    self.transfer = self._deployment.built.transfer

  def answer(self, number: int, transfer: TransferSpec) -> HandOff:
    """Serve prompt `number` by itself, its KV travelling as `transfer` says."""
    built = dataclasses.replace(self._deployment.built, transfer=transfer)
    vocab_size = self._deployment.opened.model.vocab_size
    prompt = tuple(RandomTokens(_PROMPT_LEN.value, vocab_size, number))
    request = Request('r', prompt, SamplingParams(max_tokens=OUTPUT_LEN, ignore_eos=True))
    events = tuple(dataclasses.replace(self._deployment, built=built).serve(Listed([request])))
    report = Report.from_events(events, workers=built.workers)
    (timeline,) = report.timeline.requests
    (tokens,) = (event.tokens for event in events if isinstance(event, Finished))
    second_s = timeline.token_times_s[1] - timeline.arrival_s
    if not report.num_transfers:
      return HandOff(second_s, tokens=tokens)
    spans = report.timeline.spans
    computed_s = max(span.ended_s for span in spans if span.kind == 'prefill')
    admitted_s = max(span.ended_s for span in spans if span.kind == 'transfer')
    return HandOff(second_s, max(0.0, admitted_s - computed_s), report.transfers.overlap_share or 0.0, tokens)

  def close(self) -> None:
    """End its threads."""
    self._deployment.close()


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments {argv[1:]}; options begin with --.')
  chunk, wanted = _CHUNK.value, _WAYS.value or GRANULARITIES
  if unknown := set(wanted) - set(GRANULARITIES):
    raise app.UsageError(f'--ways names {sorted(unknown)}; there are {", ".join(GRANULARITIES)}.')
  sizes: dict[str, Any] = {'max_step_tokens': chunk, 'max_sequences': 1, 'max_chunks': 1, 'num_pages': 256}
  transport: Any = _TRANSPORT.value
  spec = TransferSpec(transport, layer_groups=_LAYER_GROUPS.value)
  second = min(1, len(prepare_devices(_PLATFORM.value, 2)) - 1)
  apart = prefill_pool(1, devices=(0,), **sizes) + decode_pool(1, devices=(second,), **sizes)
  # Compiled for layer groups, an engine sends in any granularity: what travels when is decided by the state.
  layered = dataclasses.replace(spec, granularity='layers')
  ways: dict[str, tuple[Served, TransferSpec]] = {}
  made: list[Served] = []

  def served(*arguments: Any) -> Served:
    made.append(Served(*arguments))
    return made[-1]

  try:
    colocated = served(colocated_pool(1, devices=(0,), **sizes), Colocated(token_budget=chunk + 1), spec)
    ways[COLOCATED] = colocated, spec
    if named := [name for name in GRANULARITIES[:-1] if name in wanted]:
      disaggregated = served(apart, Disaggregated(max_prefill_tokens=chunk), layered)
      ways |= {name: (disaggregated, dataclasses.replace(spec, granularity=name)) for name in named}
    if AUTO in wanted:
      auto = served(apart, Disaggregated(max_prefill_tokens=chunk), spec)
      ways[AUTO] = auto, auto.transfer
    found: dict[str, list[HandOff]] = {name: [] for name in ways}
    for number in range(-1, _ROUNDS.value):  # the first round is not counted
      for name, (cluster, transfer) in ways.items():
        found[name].append(cluster.answer(max(number, 0), transfer))
  finally:
    for one in made:
      one.close()
  _show(found, ways[AUTO][1] if AUTO in ways else None)


def _show(found: dict[str, list[HandOff]], auto: TransferSpec | None) -> None:
  same = all(
    one.tokens == first.tokens for ways in zip(*found.values(), strict=True) for first in ways[:1] for one in ways
  )

  def median(name: str, field: str) -> float:
    return statistics.median(getattr(one, field) for one in found[name][1:])

  def ratio(name: str, field: str, to: str) -> float:
    """Median of the ratios within a round, of those rounds in which there is one."""
    pairs = [
      (getattr(one, field), getattr(other, field)) for one, other in zip(found[name][1:], found[to][1:], strict=True)
    ]
    return statistics.median([one / other for one, other in pairs if other] or [math.nan])

  table = Table('way', 'exposed ms', 'of whole', 'hidden', 'second token ms', 'of colocated', box=None)
  rows = []
  for name in found:
    second_s = median(name, 'second_token_s')
    relative = ratio(name, 'second_token_s', COLOCATED)
    cells = ['-', '-', '-']
    if name != COLOCATED:
      exposed_s, whole_s = median(name, 'exposed_s'), median(WHOLE, 'exposed_s') if WHOLE in found else None
      of_whole = f'{ratio(name, "exposed_s", WHOLE):.2f}' if whole_s else '-'
      cells = [f'{exposed_s * 1e3:.1f}', of_whole, f'{median(name, "hidden"):.0%}']
      rows.append(row(f'exposed hand-off, {name}', exposed_s * 1e3, 'ms', peer=WHOLE if whole_s else None,
                      peer_value=whole_s * 1e3 if whole_s else None))  # fmt: skip
      rows.append(row(f'wire time hidden, {name}', median(name, 'hidden') * 100, '%'))
    rows.append(row(f'second token, {name}', second_s * 1e3, 'ms', peer=COLOCATED,
                    peer_value=median(COLOCATED, 'second_token_s') * 1e3))  # fmt: skip
    table.add_row(name, *cells, f'{second_s * 1e3:.0f}', f'{relative:.3f}')
  console = Console(highlight=False)
  console.print(f'prompts of {_PROMPT_LEN.value} tokens in chunks of {_CHUNK.value}, {_TRANSPORT.value}')
  console.print(table)
  if auto is not None:
    of_last = '' if auto.layers_from is None else f', by layers from {auto.layers_from} tokens of the last chunk'
    console.print(f'auto is {auto.granularity}{of_last}')
  console.print(f'tokens {"all equal" if same else "[red]differ[/]"}')
  save_rows(_JSON.value, rows)


if __name__ == '__main__':
  app.run(main)
