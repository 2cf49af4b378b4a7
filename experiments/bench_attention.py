r"""How long the attention kernels take in plain XLA, by the size of the blocks they walk over.

python -m experiments.bench_attention
python -m experiments.bench_attention --json=attention.json

SmolLM2's heads (9 query, 3 key/value, of 64) in float32, pages of 16 tokens. Milliseconds are medians; compare the
columns of one run with one another, not with another machine's.
"""

import functools
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from rich.console import Console
from rich.table import Table

from experiments.rows import row, save_rows
from pallas_kernels.paged_attention import xla as paged_xla
from pallas_kernels.prefill_attention import xla as prefill_xla

_BLOCKS = flags.DEFINE_list('blocks', ['64', '128', '256', '512', '1024'], 'Cached tokens a block.')
_REPEATS = flags.DEFINE_integer('repeats', 7, 'Calls of which the median counts.', lower_bound=1)
_JSON = flags.DEFINE_string('json', None, 'Write rows of name, value, unit to this file.')

QUERY_HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE, NUM_PAGES, TABLE_WIDTH, BATCH = 9, 3, 64, 16, 1024, 512, 8


def cases(block_tokens: int) -> dict[str, Callable[[], jax.Array]]:
  """What is timed, by name."""
  rng = np.random.default_rng(0)
  pages = jnp.asarray(rng.normal(size=(NUM_PAGES, 2, KV_HEADS, PAGE_SIZE, HEAD_DIM)), jnp.float32)
  tables = jnp.asarray(rng.integers(0, NUM_PAGES, (BATCH, TABLE_WIDTH)), jnp.int32)
  queries = jnp.asarray(rng.normal(size=(512, QUERY_HEADS, HEAD_DIM)), jnp.float32)
  fixed = {'softmax_scale': HEAD_DIM**-0.5, 'block_tokens': block_tokens}
  decode = jax.jit(functools.partial(paged_xla.paged_attention, **fixed))
  prefill = jax.jit(functools.partial(prefill_xla.prefill_attention, **fixed))
  out: dict[str, Callable[[], jax.Array]] = {}
  for context in (60, 300, 1000, 4000):
    lengths = jnp.full(BATCH, context, jnp.int32)
    out[f'decode 8 at {context}'] = functools.partial(decode, queries[:BATCH], pages, tables, lengths)
  for context in (512, 2048, 8192):
    ends = jnp.array([0, 512], jnp.int32), jnp.array([context], jnp.int32)
    out[f'512 new of {context}'] = functools.partial(prefill, queries, pages, tables[:1], *ends)
  packed = jnp.arange(BATCH + 1, dtype=jnp.int32) * 64, jnp.full(BATCH, 64, jnp.int32)
  out['8 prompts of 64'] = functools.partial(prefill, queries, pages, tables, *packed)
  return out


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
  blocks = [int(block) for block in _BLOCKS.value]
  figures = {block: {n: median_ms(call, _REPEATS.value) for n, call in cases(block).items()} for block in blocks}
  table = Table(title=f'attention in XLA on {jax.devices()[0].device_kind}: ms by tokens a block')
  table.add_column('case')
  for block in blocks:
    table.add_column(str(block), justify='right')
  for name in figures[blocks[0]]:
    table.add_row(name, *(f'{figures[block][name]:.2f}' for block in blocks))
  Console().print(table)
  save_rows(
    _JSON.value,
    [row(f'{name}, block {block}', ms, 'ms') for block, column in figures.items() for name, ms in column.items()],
  )


if __name__ == '__main__':
  app.run(main)
