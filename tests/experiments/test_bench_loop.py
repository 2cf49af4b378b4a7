"""The benchmark of the host loop beside cached blocks: what it measures is what it says."""

import json
import pathlib
import subprocess
import sys

import pytest

from experiments import host_turns
from experiments.deciding import decide_seconds
from pdjax.policies import Disaggregated, RejectLate, SoonestFirstToken
from pdjax.serving.events import BlockRemoved, BlockStored
from pdjax.types import PrefixCache

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize(('cached', 'removes'), [(None, False), (0, False), (70, True)])
def test_requests_come_and_go_and_fill_a_block_for_each_64_tokens(cached, removes, monkeypatch):
  events, states = [], []
  monkeypatch.setattr(host_turns.EventLog, 'append', lambda log, event: events.append(event))
  make = host_turns.ClusterState
  monkeypatch.setattr(host_turns, 'ClusterState', lambda *args, **kw: states.append(make(*args, **kw)) or states[-1])
  seconds, blocks = host_turns.coming_and_going_seconds(4, 1400, cached, 70)
  (state,) = states
  stored = sum(isinstance(event, BlockStored) for event in events)
  assert seconds > 0 and (stored > 0) == (cached is not None)
  assert any(isinstance(event, BlockRemoved) for event in events) == removes
  if cached is None:
    assert blocks == 0 and state.books.prefixes is None
    return
  # A request leaves one block of its prompt where it is computed, and nine of 65 + 511 tokens where it decodes.
  assert blocks == pytest.approx(4 * 10 / 512, rel=0.1)
  for name in state.workers:
    assert state.books.prefixes.index.num_blocks(name) >= cached


def test_the_blocks_that_are_cached_are_as_many_as_were_asked_for():
  model, sizes = host_turns.ModelSpec.smollm2_135m(), {'num_pages': 2600, 'max_sequences': 4}
  workers = host_turns.prefill_pool(1, **sizes) + host_turns.decode_pool(1, **sizes)
  state = host_turns.ClusterState(model, workers, 64, prefix_cache=PrefixCache(block_tokens=64))
  host_turns.cache_blocks(state, 2500)
  index = state.books.prefixes.index
  assert [index.num_blocks(name) for name in state.workers] == [2500, 2500] and len(index) == 2500


def test_the_command_tells_what_cached_blocks_add_to_a_turn(tmp_path):
  figures = tmp_path / 'rows.json'
  done = subprocess.run(
    [sys.executable, '-m', 'experiments.bench_loop', '--batch=4', '--steps=20', '--repeats=2', '--cached_blocks=60',
     f'--json={figures}'],
    cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  rows = {row['name']: row for row in json.loads(figures.read_text())}
  turns = [rows[f'mean turn, 1P1D, batch 4, {name}']['value'] for name in ('no cache', 'none cached', '60 cached')]
  assert min(turns) > 0 and all(row['unit'] == 'µs' for row in rows.values())
  for name in ('no cache', 'none cached'):
    assert f'more a turn with 60 cached than with {name}, batch 4' in rows
  assert 'blocks are stored a turn' in done.stdout


@pytest.mark.parametrize(
  'parts', [{}, {'decider': SoonestFirstToken()}, {'admission': RejectLate()}], ids=['', 'decider', 'admission']
)
def test_a_decision_that_is_timed_starts_prompts_on_every_prefill_worker_and_then_nothing(parts):
  decided = decide_seconds(Disaggregated(max_prefill_tokens=256, **parts), 4, 50, 20, 3)
  assert decided.prompts >= 2 * 256 // 70 and decided.idle_s > 0 and decided.starting_s > 0
