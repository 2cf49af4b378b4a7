"""The soak finds nothing wrong while everything fails, and it does find what was made wrong."""

import errno
import json
import math
import os
import pathlib
import random
import subprocess
import sys
import threading
from collections import Counter
from typing import get_args

import numpy as np
import pytest

from experiments.faults.chaos import End, Fault
from experiments.faults.engine_faults import PassFault
from experiments.faults.full_disk import can_fill_disk, fill_disk
from experiments.faults.hostile import ENDS, PASS_FAULTS, WAY_FAULTS
from experiments.faults.kinds import KINDS, RATES, Dice, grouped
from experiments.soaking.answers import Answers
from experiments.soaking.clusters import MODEL, Alone, FaultyCluster, tokenizer
from experiments.soaking.requests import Wish, cut_short, draw_wish
from experiments.soaking.settings import SETTINGS
from experiments.soaking.soak import Soak
from experiments.soaking.watch import Hang, describe, watch
from pdjax.engine.worker import Worker
from pdjax.model.checkpoint import RandomCheckpoint
from pdjax.model.plain import PlainLoop
from pdjax.model.weights import load_weights
from pdjax.serving.page_allocator import PageAllocator
from pdjax.session import Piece, Stream
from pdjax.sharding import make_mesh
from pdjax.types import Request, SamplingParams
from tests.compiling import quick_environment

ROOT = pathlib.Path(__file__).parents[2]
SEED = 19
PATIENCE_S = 30.0


@pytest.fixture(scope='module')
def clusters() -> list[FaultyCluster]:
  return [FaultyCluster('2P2D'), FaultyCluster('2C')]


@pytest.fixture(scope='module')
def alone() -> Alone:
  return Alone()


@pytest.fixture
def soak(clusters, alone):
  """Makes soaks on the compiled clusters, and says what they said was wrong."""

  def make(kinds=tuple(KINDS), quiet_s: float = 10.0) -> Soak:
    return Soak(clusters, alone, SEED, kinds, say=print, quiet_s=quiet_s)

  return make


def waves(one: Soak, count: int) -> Soak:
  """Serve so many waves."""
  turns = iter(range(count))
  one.run(lambda: next(turns, None) is None)
  return one


# ---------------------------------------------------------------------------- nothing is wrong


def test_some_seconds_in_which_everything_fails_find_nothing_wrong(soak):
  lines, before = [], set(threading.enumerate())
  one = soak()
  watch(one, 6.0, lines.append, every_s=1.0, patience_s=PATIENCE_S)
  tally = one.tally
  assert tally.well, tally.problems
  assert tally.requests and tally.tokens and tally.faults.total()
  assert lines and all('0 wrong tokens, 0 streams that differ, 0 wrong ends, 0 leaks' in line for line in lines)
  left = set(threading.enumerate()) - before
  assert not [thread.name for thread in left if thread.name.startswith(('pdjax', 'soak'))]


@pytest.mark.slow
def test_a_minute_in_which_everything_fails_finds_nothing_wrong(tmp_path):
  figures = tmp_path / 'soak.json'
  done = subprocess.run(
    [sys.executable, '-m', 'experiments.soak', '--minutes=1', f'--seed={SEED}', f'--json={figures}'],
    cwd=ROOT, env=quick_environment(), capture_output=True, text=True, timeout=300,
  )  # fmt: skip
  assert done.returncode == 0, done.stdout + done.stderr
  assert done.stdout.startswith(f'seed {SEED}\n') and 'Nothing was wrong.' in done.stdout
  rows = {row['name']: row['value'] for row in json.loads(figures.read_text())}
  assert rows['seed'] == SEED and rows['wrong tokens'] == rows['leak'] == rows['hangs'] == 0
  assert rows['requests ended'] and rows['faults injected'] == sum(rows[f'injected, {kind}'] for kind in KINDS) > 0


@pytest.mark.parametrize('kind', KINDS)
def test_each_fault_by_itself_is_injected_and_survived(soak, monkeypatch, kind):
  if kind == 'log_full' and not can_fill_disk():
    pytest.skip('there is no /dev/full here')
  patient, *_ = SETTINGS
  monkeypatch.setattr('experiments.soaking.soak.draw_setting', lambda rng: (patient, 0.3))
  one = soak(kinds=(kind,))
  watch(one, math.inf, print, patience_s=PATIENCE_S, until=lambda: one.injected[kind] > 0)
  assert one.tally.well, one.tally.problems
  assert kind in +one.tally.faults and set(+one.tally.faults) <= {kind, *(['cancels'] if kind == 'storm' else [])}


def test_what_everyone_is_to_get_is_what_a_plain_loop_gives(alone):
  mesh = make_mesh(MODEL, [next(iter(alone.engine().workers.values())).mesh.devices.flat[0]])
  weights = load_weights(RandomCheckpoint(MODEL), MODEL, {'plain': mesh}, np.dtype(np.float32))['plain']
  loop = PlainLoop(MODEL, weights, MODEL.context_len)
  rng = random.Random(SEED)
  requests = [
    Request(f'r{length}', draw_wish(rng).prompt[:1] * length, SamplingParams(max_tokens=6)) for length in (1, 17, 60)
  ]
  answers = Answers(alone)
  answers.learn(requests)
  for request in requests:
    assert answers.of(request).token_ids == tuple(loop.generate(request.prompt, 6))
    assert answers.of(request).text == tokenizer().decode(answers.of(request).token_ids)


def test_answers_are_learnt_once_and_forgotten_in_time(alone, monkeypatch):
  served = []
  serve = alone.serve
  monkeypatch.setattr(alone, 'serve', lambda requests, watch: served.append(len(requests)) or serve(requests, watch))
  answers = Answers(alone, most=3)
  requests = [Request(f'r{index}', (5 + index,), SamplingParams(max_tokens=2, seed=1)) for index in range(4)]
  answers.learn([*requests[:2], requests[0]])
  answers.learn(requests[:3])
  answers.learn([requests[3], requests[0]])  # which forgets the second
  answers.learn(requests[:2])
  assert served == [2, 1, 1, 1]


def test_a_wish_that_is_cut_short_ends_with_what_its_answer_says(alone):
  rng = random.Random(SEED)
  answers = Answers(alone)
  wishes = [Wish((7, 8, 9 + index), SamplingParams(max_tokens=12, seed=1, ignore_eos=True)) for index in range(12)]
  answers.learn(wish.request('whole') for wish in wishes)
  short = [cut_short(rng, wish, answers.of(wish.request('whole'))) for wish in wishes]
  answers.learn(wish.request('short') for wish in short)
  ended = [answers.of(wish.request('short')) for wish in short]
  assert {one.finish_reason for one in ended} == {'stop'} and any(wish.sampling.stop for wish in short)


# ---------------------------------------------------------------------------- what was made wrong


def test_a_wrong_token_is_found(soak, monkeypatch):
  collect = Worker.collect
  wrong = []

  def lie(worker, order, pending):
    results, wasted = collect(worker, order, pending)
    if worker.spec.name == 'decode1' and results and not wrong:
      first, *rest = results
      tokens = ((first.tokens[0] + 1) % MODEL.vocab_size, *first.tokens[1:])
      wrong.append(first.request)
      results = (type(first)(first.request, tokens, first.finish_reason, first.text, first.logprobs), *rest)
    return results, wasted

  monkeypatch.setattr(Worker, 'collect', lie)
  tally = waves(soak(kinds=()), 4).tally
  assert wrong and tally.counts['wrong tokens'] == 1 and not tally.well
  assert any(f' {wrong[0]} got ' in problem and f'seed {SEED}' in problem for problem in tally.problems['wrong tokens'])


def test_a_token_that_its_completion_lacks_is_found(soak, monkeypatch):
  end = Stream._end
  given = []

  def end_with_more(stream, completions):
    if not given:
      given.append(stream.request.id)
      stream._add(Piece((5,)))
    end(stream, completions)

  monkeypatch.setattr(Stream, '_end', end_with_more)
  tally = waves(soak(kinds=()), 1).tally
  assert given and tally.counts['stream differs'] == 1
  assert f'the pieces of {given[0]} are ' in tally.problems['stream differs'][0]


def test_a_token_after_the_end_is_found(soak, monkeypatch):
  end = Stream._end
  ended = []

  def end_and_note(stream, completions):
    end(stream, completions)
    ended.append(stream)

  monkeypatch.setattr(Stream, '_end', end_and_note)
  is_quiet = Soak._is_quiet
  monkeypatch.setattr(Soak, '_is_quiet', lambda soak, now: ended[0]._add(Piece((5,))) or is_quiet(soak, now))
  tally = waves(soak(kinds=()), 1).tally
  assert tally.counts == {'stream differs': 1} and 'after its end' in tally.problems['stream differs'][0]


@pytest.mark.parametrize('number', [0, 1])
def test_a_page_that_is_never_given_back_is_found(soak, monkeypatch, number):
  drop = PageAllocator.drop
  calls = Counter()

  def drop_all_but_one(allocator, pages):
    pages = tuple(pages)
    calls['drops'] += bool(pages) and allocator.num_pages == 72  # not of the cluster that nobody disturbs
    drop(allocator, pages[1:] if calls['drops'] == 1 else pages)

  one = soak(kinds=(), quiet_s=0.5)
  one.tally.sessions = number  # which cluster it begins with
  monkeypatch.setattr(PageAllocator, 'drop', drop_all_but_one)
  tally = waves(one, 1).tally
  assert tally.counts['leak'] == 1 and '1 of 72 pages of ' in tally.problems['leak'][0]


def test_a_request_that_ends_with_an_error_that_nothing_explains_is_found(soak, monkeypatch):
  dispatch = Worker.dispatch
  failed = []

  def refuse(worker, order, *after):
    if worker.spec.name == 'prefill0' and not failed:
      failed.append(order)
      raise RuntimeError('nobody asked for this')
    return dispatch(worker, order, *after)

  setting = next(setting for setting in SETTINGS if setting.name == 'strict')
  monkeypatch.setattr('experiments.soaking.soak.draw_setting', lambda rng: (setting, 0.1))
  monkeypatch.setattr(Worker, 'dispatch', refuse)
  tally = waves(soak(kinds=()), 1).tally
  assert failed and tally.counts['wrong end'] >= 1
  assert any('nobody asked for this' in problem for problem in tally.problems['wrong end'])


def test_a_session_that_breaks_down_is_found_and_the_next_one_serves(soak, monkeypatch):
  collect = Worker.collect
  broken = []

  def explode(worker, order, pending):
    if not broken and worker.spec.name != 'both0':
      broken.append(worker.spec.name)
      raise KeyboardInterrupt  # what no job may raise
    return collect(worker, order, pending)

  monkeypatch.setattr(Worker, 'collect', explode)
  one = waves(soak(kinds=()), 1)
  assert one.tally.counts['breakdown'] >= 1 and 'KeyboardInterrupt' in one.tally.problems['breakdown'][0]
  before = one.tally.counts.copy()
  waves(one, 1)
  assert one.tally.counts == before


def test_a_hang_is_told_with_what_is_open(soak, monkeypatch):
  released = threading.Event()
  collect = Worker.collect

  def stand_still(worker, order, pending):
    if worker.spec.name == 'prefill0':
      released.wait(PATIENCE_S)
    return collect(worker, order, pending)

  one = soak(kinds=())
  monkeypatch.setattr(Worker, 'collect', stand_still)
  with pytest.raises(Hang, match=r'nothing happened for 3 s in session 0 \(2P2D, ') as told:
    watch(one, 0.1, print, patience_s=3.0)
  released.set()
  assert 'has 0 tokens' in str(told.value) and 'under way: StepOrder(' in str(told.value)
  assert 'prefill0 has ' in str(told.value)
  for thread in threading.enumerate():
    if thread.name == 'soak':
      thread.join(PATIENCE_S)


# ---------------------------------------------------------------------------- what is injected


def test_every_kind_of_fault_is_one_that_an_engine_can_be_given():
  by_moment = {moment: {name for name, kind in KINDS.items() if kind.moment == moment} for moment in RATES}
  assert by_moment['transfer'] == set(WAY_FAULTS) and set(get_args(Fault)) < set(WAY_FAULTS.values())
  assert by_moment['end'] == set(ENDS) and set(get_args(End)) == set(ENDS.values())
  assert by_moment['pass'] == set(PASS_FAULTS) and set(get_args(PassFault)) == set(PASS_FAULTS.values())


def test_an_unknown_fault_is_refused_with_those_there_are():
  done = subprocess.run(
    [sys.executable, '-m', 'experiments.soak', '--only=pass_stalls,gremlins'],
    cwd=ROOT, env=quick_environment(), capture_output=True, text=True, timeout=120,
  )  # fmt: skip
  assert done.returncode == 1 and '--only names gremlins, expected some of transfer_refused, ' in done.stderr


def test_dice_draw_what_is_wanted_as_often_as_is_wanted_and_count_it():
  counts = Counter()
  dice = Dice(random.Random(0), 0.5, ['transfer_fails', 'end_late', 'pass_refused', 'pass_stalls'], counts)
  drawn = Counter(dice.draw(moment) for moment in RATES for _ in range(2000))
  assert set(drawn) == {None, 'transfer_fails', 'end_late', 'pass_refused', 'pass_stalls'}
  assert counts == Counter({kind: count for kind, count in drawn.items() if kind is not None})
  assert 900 < counts['transfer_fails'] < 1100 and 200 < counts['pass_refused'] + counts['pass_stalls'] < 400
  assert grouped(counts)['transfers'] == counts['transfer_fails'] and grouped(counts)['logs'] == 0


def test_only_what_is_wanted_is_injected(soak):
  tally = waves(soak(kinds=('transfer_fails', 'lost_in_decode')), 6).tally
  assert set(+tally.faults) <= {'transfer_fails', 'lost_in_decode'} and tally.faults.total() > 0
  assert 'cancelled' not in tally.ends and tally.well, tally.problems


def test_errors_are_allowed_only_where_the_settings_and_the_faults_explain_them():
  patient, _, short, strict = SETTINGS
  link = 'RuntimeError: the link broke'
  assert not patient.allows(link, Counter(transfer_fails=1))
  assert strict.allows(link, Counter(transfer_fails=1)) and not strict.allows(link, Counter(transfer_slow=1))
  away = "every worker that decodes is lost: 'decode0' (it is gone)."
  assert short.allows(away, Counter(lost_in_decode=1)) and not short.allows(away, Counter(transfer_fails=1))


@pytest.mark.skipif(not can_fill_disk(), reason='there is no /dev/full here')
def test_a_full_disk_fails_what_is_open_in_its_folder_alone(tmp_path):
  inside, outside = (tmp_path / name for name in ('log', 'other'))
  inside.mkdir()
  with (inside / 'events.jsonl').open('wb', buffering=0) as file, outside.open('w') as other:
    file.write(b'fits\n')
    assert fill_disk(inside) == 1
    with pytest.raises(OSError) as full:
      file.write(b'does not fit\n')
    assert full.value.errno == errno.ENOSPC
    other.write('fits')
  assert outside.read_text() == 'fits' and (inside / 'events.jsonl').read_bytes() == b'fits\n'
  assert fill_disk(inside) == 0


def test_how_it_goes_is_told_in_a_line(soak):
  one = soak()
  one.tally.faults.update(transfer_fails=1200, pass_refused=2)
  one.tally.counts.update({'leak': 3})
  line = describe(one.tally)
  assert '1,202 faults (1,200 transfers, 2 passes), 0 wrong tokens' in line and '3 leaks' in line
  assert os.linesep not in line
