r"""The speed of the prefix index on one core, and the memory of a block.

python -m experiments.bench_index
python -m experiments.bench_index --blocks=100000 --json=index.json

Prompts of 1,000 blocks of 64 tokens, of which the first 600 are those of one of eight systems, begin and end on a
worker whose pages are all cached: each block is hashed from its tokens, looked up, held, and where it is missing takes
a page from the oldest, is stored, and told. Then look-ups of keys that are known. Memory is what a process grows by
until a million blocks lie on two workers, their counts and the order in which they go included.
"""

import statistics

from absl import app, flags
from rich.console import Console
from rich.table import Table

from experiments.rows import row, save_rows
from experiments.two_trees import HERE, measure

_BLOCKS = flags.DEFINE_integer('blocks', 100_000, 'Blocks that a worker holds.', lower_bound=20_000)
_PROMPTS = flags.DEFINE_integer('prompts', 200, 'Prompts of a run.', lower_bound=1)
_REPEATS = flags.DEFINE_integer('repeats', 3, 'Runs of which the median counts.', lower_bound=1)
_MEMORY = flags.DEFINE_integer('memory_blocks', 1_000_000, 'Blocks of which the memory is told; 0 leaves it out.')
_JSON = flags.DEFINE_string('json', None, 'Write rows of name, value, unit to this file.')


def serve_prompts(blocks: int, prompts: int, places: int, shared: bool) -> dict[str, float]:
  """Fill workers with the blocks of prompts, and then have more prompts come; it names nothing of this file.

  Args:
    blocks: Pages of a worker, a block each.
    prompts: Prompts behind those that fill them; 0 only fills.
    places: Workers, each of which gets every prompt.
    shared: Whether prompts begin with one of eight systems; else all are unlike.

  Returns:
    `stored`, the blocks behind the filling; `cpu_s` of the prompts behind that; `find_s` of looking their keys up, and
    `found`; `bytes`, by which the process has grown.
  """
  import gc
  import os
  import time
  from collections.abc import Sequence
  from typing import cast

  import numpy as np

  from pdjax.serving.books import Books
  from pdjax.serving.requests import RequestState
  from pdjax.types import FaultSpec, ModelSpec, PrefixCache, Request, SamplingParams, TransferSpec, colocated_pool

  def resident() -> int:
    with open('/proc/self/statm', encoding='utf-8') as file:
      return int(file.read().split()[1]) * os.sysconf('SC_PAGE_SIZE')

  model = ModelSpec.smollm2_135m()
  workers = colocated_pool(places, num_pages=blocks, max_sequences=1)
  rng, tokens = np.random.default_rng(0), 64 * 1000
  systems = [rng.integers(0, 49_000, 64 * 600, dtype=np.int32) for _ in range(8)]
  number, sampling = 0, SamplingParams(max_tokens=1)

  def next_request() -> RequestState:
    nonlocal number
    number += 1
    prompt = rng.integers(0, 49_000, tokens, dtype=np.int32)
    if shared:
      prompt[: len(systems[0])] = systems[number % 8]
    return RequestState(Request(f'r{number}', cast(Sequence[int], prompt), sampling), limit=1)

  gc.collect()
  before = resident()
  books = Books(
    model, workers, 64, TransferSpec(), FaultSpec(), finds_stops=False, prefix_cache=PrefixCache(block_tokens=64)
  )
  prefixes = books.prefixes
  assert prefixes is not None

  def serve(entry: RequestState) -> int:
    missed = 0
    for worker in books.workers.values():
      entry.worker = worker.name
      found = books.hold_cached(entry, worker.name, entry.prompt_len)
      books.reserve(entry, worker, decodes=False, found=found)
      prefixes.note_computed(entry, worker.name, worker.name, entry.prompt_len)
      books.leave(entry, worker.name)
      missed += (entry.prompt_len - found.tokens) // 64
    books.told.clear()
    return missed

  while min(prefixes.index.num_blocks(name) for name in books.workers) < blocks - 1000:
    serve(next_request())
  gc.collect()
  grown = resident() - before
  for _ in range(min(prompts, 16)):  # so that the systems are there
    serve(next_request())
  waiting = [next_request() for _ in range(prompts)]
  began_s = time.process_time()
  stored = sum(map(serve, waiting))
  cpu_s = time.process_time() - began_s
  keys = [one.keys[next(iter(one.keys))][1] for one in waiting]
  began_s = time.process_time()
  found = sum(int((prefixes.index.find(one) >= 0).sum()) for one in keys)
  find_s = time.process_time() - began_s
  return {'stored': stored, 'cpu_s': cpu_s, 'find_s': find_s, 'found': found, 'bytes': grown}


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments {argv[1:]}; options begin with --.')
  rows, table = [], Table(title=f'the prefix index, {_BLOCKS.value:,} blocks, one core')
  table.add_column('figure')
  table.add_column('value', justify='right')
  runs = [
    measure(HERE, serve_prompts, blocks=_BLOCKS.value, prompts=_PROMPTS.value, places=1, shared=True)
    for _ in range(_REPEATS.value)
  ]
  count = 1000 * _PROMPTS.value
  figures = {
    'blocks a second, hashed, looked up, stored': statistics.median(count / run['cpu_s'] for run in runs),
    'look-ups a second of known keys': statistics.median(count / run['find_s'] for run in runs),
  }
  for name, value in figures.items():
    table.add_row(name, f'{value:,.0f}')
    rows.append(row(name, value, '1/s'))
  missed = runs[0]['stored'] / count
  table.add_row('blocks that were missing', f'{missed:.1%}')
  if _MEMORY.value:
    run = measure(HERE, serve_prompts, blocks=_MEMORY.value, prompts=0, places=2, shared=False)
    size = run['bytes'] / _MEMORY.value
    table.add_row('bytes a block on two workers', f'{size:.1f}')
    rows.append(row('bytes a block on two workers', size, 'bytes'))
  Console().print(table)
  save_rows(_JSON.value, rows)


if __name__ == '__main__':
  app.run(main)
