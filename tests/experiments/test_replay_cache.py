"""The hit rates of a cache on a trace, against counts that share no code with it."""

import dataclasses
import itertools
import json
import math
import pathlib
import random
import subprocess
import sys
from collections import OrderedDict

import pytest

import pdjax
from configs.llama3_8b_simulated import get_config
from experiments.prefix_hits import HitRate, Prompts, replay, replay_lru, replay_optimum
from pdjax.serving.events import Started
from pdjax.serving.orders import StepOrder
from pdjax.types import PrefixCache, decode_pool, prefill_pool
from pdjax.workload import Given, TraceWorkload, read_trace

ROOT = pathlib.Path(__file__).parents[2]
TRACES = ROOT / 'tests' / 'data' / 'traces'
CUTS = ('mooncake_conversation.jsonl', 'weka_agentic.jsonl', 'bailian_made_up.jsonl')


def lru_hits(paths: list[list], capacity: int) -> list[int]:
  """Leading hits of a cache of so many blocks; a block is the tuple of all ids up to its own."""
  cache: OrderedDict = OrderedDict()  # the first goes first
  hits = []
  for path in paths:
    blocks = [tuple(path[: end + 1]) for end in range(len(path))]
    held = [block in cache for block in blocks]
    hits.append(held.index(False) if False in held else len(held))
    assert not any(held[hits[-1] :]), 'a block is there without the one before it'
    for block in reversed(blocks[:capacity]):  # a prompt's first block is the last to go
      cache.pop(block, None)
      cache[block] = True
    while len(cache) > capacity:
      cache.popitem(last=False)
  return hits


def most_hits(paths: list[list], capacity: int) -> int:
  """The most leading hits that any choice of what to keep has, by trying all."""
  states = {frozenset(): 0}
  for path in paths:
    blocks = [tuple(path[: end + 1]) for end in range(len(path))]
    after: dict[frozenset, int] = {}
    for cache, before in states.items():
      hits = before + sum(1 for _ in itertools.takewhile(cache.__contains__, blocks))
      there = cache | {*blocks}
      for kept in itertools.combinations(sorted(there), min(capacity, len(there))):
        after[frozenset(kept)] = max(after.get(frozenset(kept), -1), hits)
    states = after
  return max(states.values())


def prompts_of(paths: list[list]) -> Prompts:
  """The same, of whole blocks of 4 tokens."""
  return Prompts.of([
    pdjax.Request(f'r{i}', range(4 * len(path)), block_hashes=tuple(path), block_size=4) for i, path in enumerate(paths)
  ])  # fmt: skip


def random_paths(rng: random.Random, count: int, ids: int, longest: int) -> list[list]:
  """Prompts that branch from one another; an id comes behind several others."""
  paths = [[rng.randrange(ids)]]
  for _ in range(count - 1):
    old = rng.choice(paths)
    path = old[: rng.randint(0, len(old))] + [rng.randrange(ids) for _ in range(rng.randint(0, 3))]
    paths.append(path[:longest] or [0])
  return paths


@pytest.mark.parametrize('name', CUTS)
def test_a_cache_without_end_hits_what_an_independent_count_has(name):
  trace = read_trace(TRACES / name)
  seen, hits, tokens = set(), [], 0
  for request in trace.requests:
    hit, path = 0, ()
    for block in request.block_hashes:
      path += (block,)
      if path not in seen:
        break
      hit += 1
    seen |= {request.block_hashes[: end + 1] for end in range(len(request.block_hashes))}
    hits.append(hit)
    tokens += min(hit * request.block_size, request.prompt_len)
  prompts = Prompts.of(trace.requests)
  attainable, found = replay(prompts, [math.inf])
  assert replay_lru(prompts, prompts.num_distinct) == replay_optimum(prompts, prompts.num_distinct) == hits
  assert prompts.num_distinct == len(seen) and sum(hits) > 0
  expected = HitRate(
    sum(hits) / sum(len(one.block_hashes) for one in trace.requests),
    tokens / sum(one.prompt_len for one in trace.requests),
  )
  assert attainable == found[math.inf]['LRU'] == found[math.inf]['optimum'] == expected


def test_hits_of_the_made_up_chats_are_those_that_one_counts_by_hand():
  """In the order of arrival; ids 11 and 12 behind 20 are no hits, and the last prompt has no whole last block."""
  prompts = Prompts.of(read_trace(TRACES / 'bailian_made_up.jsonl').requests)
  assert replay_lru(prompts, 100) == replay_optimum(prompts, 100) == [0, 0, 2, 2, 4, 3]
  assert HitRate.of(prompts, [0, 0, 2, 2, 4, 3]) == HitRate(11 / 24, 11 * 16 / 337)
  assert HitRate.of(prompts, [3, 0, 0, 0, 0, 0]).tokens == 40 / 337


@pytest.mark.parametrize('name', CUTS)
@pytest.mark.parametrize('share', [0.02, 0.1, 0.3, 0.7])
def test_lru_is_an_independent_lru_on_the_cuts_and_the_optimum_is_no_worse(name, share):
  requests = read_trace(TRACES / name).requests
  prompts = Prompts.of(requests)
  capacity = max(int(share * prompts.num_distinct), 1)
  hits = replay_lru(prompts, capacity)
  assert hits == lru_hits([[*one.block_hashes] for one in requests], capacity)
  assert sum(hits) <= sum(replay_optimum(prompts, capacity))


@pytest.mark.parametrize('seed', range(5))
def test_lru_is_an_independent_lru_on_random_traces_and_the_optimum_is_no_worse(seed):
  rng = random.Random(seed)
  paths = random_paths(rng, 400, ids=4, longest=12)
  prompts = prompts_of(paths)
  for capacity in (1, 3, 8, 20, 60, 200, 1000):
    hits = replay_lru(prompts, capacity)
    assert hits == lru_hits(paths, capacity)
    assert sum(hits) <= sum(replay_optimum(prompts, capacity))


@pytest.mark.parametrize('seed', range(60))
def test_no_choice_of_what_to_keep_has_more_hits_than_the_optimum(seed):
  rng = random.Random(seed)
  paths = random_paths(rng, 7, ids=2, longest=4)
  for capacity in (1, 2, 3, 4):
    assert sum(replay_optimum(prompts_of(paths), capacity)) == most_hits(paths, capacity)


def test_numbers_of_blocks_are_equal_where_all_before_them_is():
  prompts = prompts_of([[5, 6], [6, 6], [5, 6, 6], [5]])
  assert [blocks.tolist() for blocks in prompts.blocks] == [[0, 1], [2, 3], [0, 1, 4], [0]]
  assert (prompts.num_distinct, prompts.block_size, prompts.lens) == (5, 4, (8, 8, 12, 4))


def test_a_prompt_without_ids_is_no_hit_and_counts_as_tokens(tmp_path):
  row = {'timestamp': 0, 'input_length': 512, 'output_length': 1, 'hash_ids': [1]}
  rows = [row, row | {'hash_ids': []}, row]
  (tmp_path / 'trace').write_text('\n'.join(map(json.dumps, rows)))
  attainable, found = replay(Prompts.of(read_trace(tmp_path / 'trace').requests), [600])
  assert attainable == HitRate(1 / 2, 1 / 3) == found[600]['LRU']


# ---------------------------------------------------------------------------- the command

# Reads arguments as JSON lines and runs the command with each, in one process; answers with why it refused them.
COMMAND = """
import json, sys
from absl import flags
from experiments import replay_cache

for line in sys.stdin:
  flags.FLAGS.unparse_flags()
  for name in ('trace', 'format', 'capacities', 'json', 'figure'):
    flags.FLAGS[name].unparse()
  argv = flags.FLAGS(['replay_cache', *json.loads(line)])
  try:
    replay_cache.main(argv)
  except SystemExit as end:
    print(f'EXIT {end.code}', file=sys.stderr)
"""


def command(*lines: list[str]) -> tuple[str, str]:
  """All that the command says on stdout and stderr when it is given these arguments, one list after another."""
  asked = '\n'.join(map(json.dumps, lines))
  done = subprocess.run(
    [sys.executable, '-c', COMMAND], cwd=ROOT, input=asked, capture_output=True, text=True, check=False
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  return done.stdout, done.stderr


def test_the_command_prints_a_table_and_writes_rows_and_a_picture(tmp_path):
  path = TRACES / 'mooncake_conversation.jsonl'
  rows_path, picture_path = tmp_path / 'rows.json', tmp_path / 'hits.svg'
  said, _ = command([f'--trace={path}', '--capacities=0.2M,inf,20k', f'--json={rows_path}', f'--figure={picture_path}'])
  rows = json.loads(rows_path.read_text())
  attainable, found = replay(Prompts.of(read_trace(path).requests), [20_000, 200_000, math.inf])
  assert [one['name'] for one in rows[::2]] == [f'hits, LRU, {text} tokens' for text in ('20k', '200k', 'inf')]
  assert [one['value'] for one in rows[::2]] == [rates['LRU'].tokens for rates in found.values()]
  assert [one['peer_value'] for one in rows[1::2]] == [rates['optimum'].blocks for rates in found.values()]
  assert f'{found[20_000]["LRU"].tokens:.2%}' in said and f'{attainable.blocks:.2%}' in said and '222 prompts' in said
  picture = picture_path.read_text()
  assert 'optimum' in picture and f'{attainable.tokens:.1%}' in picture
  tokens = [rates['LRU'].tokens for rates in found.values()]
  assert tokens == sorted(tokens) and tokens[0] < tokens[-1] == attainable.tokens


def test_what_the_command_cannot_do_is_said_in_one_line_that_names_the_flag():
  trace = f'--trace={TRACES / CUTS[0]}'
  azure = TRACES / 'azure_code_2023.csv'
  cases = [
    ([], '--trace is missing'),
    (['--trace=none'], "--trace=none: the trace 'none' is no file, expected a file"),
    ([f'--trace={azure}'], f'--trace={azure}: the trace has no ids of blocks, expected ids of blocks'),
    ([trace, '--format=weka'], 'line 1: there is no id'),
    ([trace, '--capacities=511'], '--capacities=511: the capacity 511 is below the 512 tokens of one block'),
    ([trace, '--capacities=1M,many'], "--capacities=1M,many: the capacity 'many' is not understood"),
    ([trace, '--capacities=-1'], "--capacities=-1: the capacity '-1' is not understood"),
    ([trace, '--capacities='], '--capacities=: there is none, expected numbers of tokens such as 500k,3M,inf'),
    ([trace, '--figure=a.jpg'], '--figure=a.jpg wants a name that ends in .svg or .png'),
    ([trace, '--figure=a.svg', '--capacities=inf'], '--figure draws hits by size'),
    ([trace, '--json=nowhere/a.json'], '--json=nowhere/a.json is no file in a folder that is there'),
    (['surplus'], "unexpected arguments ['surplus']"),
  ]
  out, errors = command(*(arguments for arguments, _ in cases))
  said = errors.splitlines()
  assert not out and len(said) == 2 * len(cases) and {*said[1::2]} == {'EXIT 1'}
  for line, (_, words) in zip(said[::2], cases, strict=True):
    assert line.startswith('error: ') and words in line


# ---------------------------------------------------------------------------- in the simulator


def simulated(workload) -> tuple[pdjax.RunResult, dict[str, int]]:
  """A run with a prefix cache, and the prompt tokens of each request that it found in it."""
  sizes = {'tp': 8, 'max_sequences': 64, 'max_step_tokens': 2048, 'max_chunks': 32}
  config = dataclasses.replace(
    get_config(), workers=prefill_pool(1, **sizes) + decode_pool(1, **sizes), workload=workload,
    prefix_cache=PrefixCache(block_tokens=16), page_size=64, max_context=2**17,
  )  # fmt: skip
  result = pdjax.simulate(config, keep_events=True)
  reached: dict[str, int] = {}
  cached: dict[str, int] = {}
  computed: dict[str, int] = {}
  for event in result.events:
    if isinstance(event, Started) and isinstance(event.order, StepOrder):
      for chunk in event.order.chunks:
        name = chunk.request.id
        assert chunk.start == reached.get(name, chunk.start)  # chunks follow one another
        cached.setdefault(name, chunk.start)
        computed[name] = computed.get(name, 0) + chunk.length
        reached[name] = chunk.start + chunk.length
  for one in result.completions:
    assert cached[one.request.id] + computed[one.request.id] == one.request.prompt_len
  return result, cached


def hits_without_end(requests) -> dict[str, int]:
  """Tokens of whole blocks of 16 that came before, of each prompt but its last token."""
  hits = replay_optimum(Prompts.of(requests), 10**9)
  return {
    one.id: min(hit * one.block_size, one.prompt_len - 1) // 16 * 16 for one, hit in zip(requests, hits, strict=True)
  }


def test_a_trace_is_served_in_the_simulator_and_what_is_cached_is_not_computed():
  path = TRACES / 'mooncake_conversation.jsonl'
  trace = read_trace(path)
  result, cached = simulated(TraceWorkload(path=path, rate=0.5))
  assert result.report.completed == 222
  assert {one.request.id: len(one.token_ids) for one in result.completions} == trace.output_lens
  most = hits_without_end(trace.requests)
  assert all(cached[name] <= most[name] for name in most)
  assert sum(cached.values()) > 0.9 * sum(most.values())  # of two that come at once, neither finds the other


@pytest.mark.parametrize('name', CUTS[::2])
def test_the_simulator_finds_what_the_count_finds_of_prompts_that_come_one_after_another(name):
  sampling = pdjax.SamplingParams(max_tokens=2, ignore_eos=True)
  requests = tuple(
    dataclasses.replace(one, arrival_s=10.0 * index, sampling=sampling)
    for index, one in enumerate(read_trace(TRACES / name).requests)
  )
  _, cached = simulated(Given(requests))
  assert cached == hits_without_end(requests)
