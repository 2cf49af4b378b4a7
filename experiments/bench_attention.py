r"""Times of the attention kernels in plain XLA, by the size of the blocks they walk over.

python -m experiments.bench_attention
python -m experiments.bench_attention --json=attention.json

SmolLM2's heads (9 query, 3 key/value, of 64) in float32, pages of 16 tokens. Milliseconds are medians; compare the
columns of one run with one another, not with another machine's.
"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from rich.console import Console
from rich.table import Table

from experiments.rows import row, save_rows
from pallas_kernels.paged_attention import xla as paged_xla
from pallas_kernels.prefill_attention import xla as prefill_xla

_DECODE = flags.DEFINE_list('decode', ['32', '64', '128', '256'], 'Decode: cached tokens a block.')
_PREFILL = flags.DEFINE_list(
  'prefill', ['64x64', '64x128', '128x128', '256x128', '256x256'], 'Prefill: query tokens x cached tokens a block.'
)
_REPEATS = flags.DEFINE_integer('repeats', 7, 'Calls of which the median counts.', lower_bound=1)
_JSON = flags.DEFINE_string('json', None, 'Write rows of name, value, unit to this file.')

QUERY_HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE, NUM_PAGES, TABLE_WIDTH, BATCH = 9, 3, 64, 16, 1024, 512, 8
SCALE = HEAD_DIM**-0.5


def decodes(block_tokens: int) -> dict[str, Callable[[], jax.Array]]:
  """Decode steps to time, by name."""
  queries, pages, tables = _arrays()
  call = jax.jit(functools.partial(paged_xla.paged_attention, softmax_scale=SCALE, block_tokens=block_tokens))

  def case(*contexts: int) -> Callable[[], jax.Array]:
    lengths = jnp.resize(jnp.array(contexts, jnp.int32), (BATCH,))
    return functools.partial(call, queries[:BATCH], pages, tables, lengths)

  return {f'{BATCH} at {context}': case(context) for context in (60, 300, 1000, 4000)} | {
    f'{BATCH}, half at 60, half at 4000': case(60, 4000)
  }


def prefills(block_rows: int, block_tokens: int) -> dict[str, Callable[[], jax.Array]]:
  """Prefills to time, by name."""
  queries, pages, tables = _arrays()
  blocks = block_rows, block_tokens
  call = jax.jit(functools.partial(prefill_xla.prefill_attention, softmax_scale=SCALE, blocks=blocks))

  def case(prompts: int, new: int, context: int) -> Callable[[], jax.Array]:
    offsets, lengths = jnp.arange(prompts + 1, dtype=jnp.int32) * new, jnp.full(prompts, context, jnp.int32)
    return functools.partial(call, queries[: prompts * new], pages, tables[:prompts], offsets, lengths)

  alone = {f'512 new of {context}': case(1, 512, context) for context in (512, 2048, 8192)}
  return alone | {
    f'{prompts} prompts of {512 // prompts}': case(prompts, 512 // prompts, 512 // prompts) for prompts in (2, 8, 16)
  }


def _arrays() -> tuple[jax.Array, jax.Array, jax.Array]:
  rng = np.random.default_rng(0)
  pages = jnp.asarray(rng.normal(size=(NUM_PAGES, 2, KV_HEADS, PAGE_SIZE, HEAD_DIM)), jnp.float32)
  tables = jnp.asarray(rng.integers(0, NUM_PAGES, (2 * BATCH, TABLE_WIDTH)), jnp.int32)
  return jnp.asarray(rng.normal(size=(512, QUERY_HEADS, HEAD_DIM)), jnp.float32), pages, tables


def median_ms(call: Callable[[], jax.Array], repeats: int) -> float:
  """Milliseconds of a call, compiled before."""
  call().block_until_ready()
  seconds = []
  for _ in range(repeats):
    begin = time.perf_counter()
    call().block_until_ready()
    seconds.append(time.perf_counter() - begin)
  return statistics.median(seconds) * 1e3


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments {argv[1:]}; options begin with --.')
  rows: list[dict[str, Any]] = []
  for phase, make, sizes in (('decode', decodes, _DECODE.value), ('prefill', prefills, _PREFILL.value)):
    figures = {
      size: {name: median_ms(call, _REPEATS.value) for name, call in make(*map(int, size.split('x'))).items()}
      for size in sizes
    }
    table = Table(title=f'{phase} attention in XLA on {jax.devices()[0].device_kind}: ms by block')
    table.add_column('case')
    for size in sizes:
      table.add_column(size, justify='right')
    for name in figures[sizes[0]]:
      table.add_row(name, *(f'{figures[size][name]:.2f}' for size in sizes))
    Console().print(table)
    rows += [row(f'{phase} {name}, block {size}', ms, 'ms') for size in sizes for name, ms in figures[size].items()]
  save_rows(_JSON.value, rows)


if __name__ == '__main__':
  app.run(main)
