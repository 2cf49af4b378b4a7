r"""The gain of pages that are taken as sequences grow: requests that decode at once at equal bytes, by arithmetic too.

python -m experiments.growth
python -m experiments.growth --backend=simulator --prompts=64,128,256,1000 --page_sizes=16,64 --json=growth.json

A decode worker whose pages are what is scarce gets more requests than it can hold. With all pages at once a request
takes those of its prompt and of as many tokens as it may generate, 512; with some ahead, those of what it has. Outputs
are exponential, 64 tokens on average. Counted is the time between a fifth and four fifths of the ends.
"""

import math
import random
import statistics
import sys
from collections.abc import Sequence
from typing import Any, Literal, cast

from absl import app, flags
from rich.console import Console
from rich.table import Table

from experiments.rows import row, save_rows
from pdjax.config import ServingConfig
from pdjax.deployment import BackendName, deploy
from pdjax.opened_model import open_model
from pdjax.policies import Disaggregated
from pdjax.serving.events import Event, Finished, Occupancy, Preempted
from pdjax.types import ModelSpec, Request, SamplingParams, decode_pool, prefill_pool
from pdjax.workload import Listed

_PROMPTS = flags.DEFINE_list('prompts', ['64', '128', '256', '1000'], 'Tokens of all prompts, a case each.')
_PAGE_SIZES = flags.DEFINE_list('page_sizes', ['16', '64'], 'Tokens per page, a case each.')
_AHEAD = flags.DEFINE_integer('ahead', 1, 'Pages ahead.', lower_bound=0)
_REQUESTS = flags.DEFINE_integer('requests', 200, 'Requests of a case.', lower_bound=20)
_BACKEND = flags.DEFINE_enum('backend', 'engine', ['engine', 'simulator'], 'What serves.')
_JSON = flags.DEFINE_string('json', None, 'Write rows of name, value, unit to this file.')

_MEAN, _MOST = 64, 512  # tokens of an answer
_AT_ONCE = 6  # requests that decode at once with all pages
_MODEL = ModelSpec(
  'tiny', num_layers=2, embed_dim=32, query_heads=4, kv_heads=2, head_dim=16, ffn_dim=64, vocab_size=256,
  context_len=2048,
)  # fmt: skip


def pages_with_all(prompt_len: int, page_size: int) -> int:
  """Pages of a request that takes them all at once."""
  return -(-(prompt_len + _MOST - 1) // page_size)


def pages_growing(prompt_len: int, page_size: int, ahead: int) -> float:
  """Pages of a request that decodes, on average over its time: of age `a` with odds of its being that long."""
  most = pages_with_all(prompt_len, page_size)
  odds = [math.exp(-age / _MEAN) for age in range(_MOST)]
  held = [min(-(-(prompt_len + age + 1) // page_size) + ahead, most) for age in range(_MOST)]
  return sum(odd * pages for odd, pages in zip(odds, held, strict=True)) / sum(odds)


def serve_case(
  prompt_len: int, page_size: int, ahead: int | Literal['all'], count: int, backend: BackendName
) -> tuple[float, float]:
  """Requests that decode at once, on average over the steady middle; tokens computed anew as a share of those made."""
  rng = random.Random(prompt_len)
  lengths = {f'r{i}': min(max(round(rng.expovariate(1 / _MEAN)), 1), _MOST) for i in range(count)}
  sampling = SamplingParams(max_tokens=_MOST, ignore_eos=True)
  requests = [Request(name, tuple(rng.choices(range(2, 256), k=prompt_len)), sampling) for name in lengths]
  sizes: dict[str, Any] = {'max_step_tokens': 1024, 'max_sequences': 64, 'max_fused_steps': 1}
  config = ServingConfig(
    model=_MODEL,
    checkpoint='random',
    workers=(
      *prefill_pool(1, num_pages=-(-24 * prompt_len // page_size), **sizes),
      *decode_pool(1, num_pages=_AT_ONCE * pages_with_all(prompt_len, page_size), **sizes),
    ),
    policy=Disaggregated(max_prefill_tokens=1024),
    page_size=page_size,
    pages_ahead=ahead,
    dtype='float32',
    platform='cpu',
  )  # fmt: skip
  deployment = deploy(config, open_model(config), backend)
  try:
    events = list(deployment.serve(Listed(requests, lengths)))
  finally:
    deployment.close()
  made = sum(len(event.tokens) for event in events if isinstance(event, Finished))
  assert made == sum(lengths.values()), 'a request got more or fewer tokens than it was to get'
  again = sum(event.tokens for event in events if isinstance(event, Preempted))
  return at_once(events), again / made


def at_once(events: Sequence[Event]) -> float:
  """Sequences in slots, on average over the time between a fifth and four fifths of all ends."""
  ends = sorted(event.now_s for event in events if isinstance(event, Finished))
  begin_s, end_s = ends[len(ends) // 5], ends[-len(ends) // 5]
  total, before_s, decoding = 0.0, begin_s, 0
  for event in events:
    if isinstance(event, Occupancy):
      now_s = min(max(event.now_s, begin_s), end_s)
      total, before_s = total + decoding * (now_s - before_s), now_s
      decoding = next((use.decoding for use in event.workers if use.worker == 'decode0'), decoding)
  return (total + decoding * (end_s - before_s)) / (end_s - begin_s)


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments {argv[1:]}; options begin with --.')
  for name, values in (('prompts', _PROMPTS.value), ('page_sizes', _PAGE_SIZES.value)):
    if not all(value.isdigit() and int(value) for value in values):
      raise app.UsageError(f'--{name} is {values}, expected positive counts of tokens, e.g. 16,64.')
  table = Table(title=f'requests that decode at once at equal bytes, {_AHEAD.value} page(s) ahead against all')
  for column in ('prompt', 'page', 'all', 'ahead', 'ratio', 'arithmetic', 'off', 'recomputed'):
    table.add_column(column, justify='right')
  rows, off = [], []
  for page_size in map(int, _PAGE_SIZES.value):
    for prompt_len in map(int, _PROMPTS.value):
      found = {
        ahead: serve_case(prompt_len, page_size, ahead, _REQUESTS.value, cast(BackendName, _BACKEND.value))
        for ahead in ('all', _AHEAD.value)
      }
      (whole, _), (growing, again) = found.values()
      expected = pages_with_all(prompt_len, page_size) / pages_growing(prompt_len, page_size, _AHEAD.value)
      off.append(growing / whole / expected - 1)
      table.add_row(
        str(prompt_len), str(page_size), f'{whole:.2f}', f'{growing:.2f}', f'{growing / whole:.2f}',
        f'{expected:.2f}', f'{off[-1]:+.1%}', f'{again:.1%}',
      )  # fmt: skip
      what = f'prompts of {prompt_len}, pages of {page_size}'
      rows.append(row(f'at once, {what}', growing, 'requests', peer='all pages at once', peer_value=whole))
      rows.append(row(f'recomputed, {what}', again, 'of tokens made'))
  Console().print(table)
  print(f'off the arithmetic by {statistics.median(map(abs, off)):.1%} in the median, {max(map(abs, off)):.1%} at most')
  save_rows(_JSON.value, rows)
  sys.exit(0)


if __name__ == '__main__':
  app.run(main)
