"""The soak finds nothing wrong while everything fails, and it does find what was made wrong."""

import contextlib
import dataclasses
import errno
import json
import math
import os
import pathlib
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import get_args

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.faults.chaos import End, Fault
from experiments.faults.engine_faults import SLOW_S, STEP_STALL_S, StepFault
from experiments.faults.full_disk import can_fill_disk, fill_disk
from experiments.faults.hostile import ENDS, LINK_FAULTS, STEP_FAULTS, WAY_FAULTS
from experiments.faults.kinds import KINDS, RATES, Dice, grouped
from experiments.faults.leaks import leaks
from experiments.faults.losses import NOBODY_BRINGS_IT_BACK, Loss, Losses
from experiments.soaking.answers import Answers
from experiments.soaking.clusters import DEADLINE_S, FEW_PAGES, MODEL, Alone, FaultyCluster, tokenizer
from experiments.soaking.logs import judge_log
from experiments.soaking.requests import Wish, cut_short, draw_wish
from experiments.soaking.resources import Resources
from experiments.soaking.settings import SETTINGS
from experiments.soaking.soak import Soak
from experiments.soaking.watch import Hang, describe, watch
from pdjax.engine.worker import Worker
from pdjax.kv.transfer import Parcel
from pdjax.metrics import EventLog
from pdjax.metrics.lines_file import LinesFile
from pdjax.model.checkpoint import RandomCheckpoint
from pdjax.model.plain import PlainLoop
from pdjax.model.weights import load_weights
from pdjax.run_folder import EVENTS
from pdjax.serving import ClusterState
from pdjax.serving.actions import Cancel, Resend
from pdjax.serving.events import Done, Event, Failed, TimerDue, Turn, Withdrawn, WorkerBack, WorkerLost
from pdjax.serving.page_allocator import PageAllocator
from pdjax.session import Delta, Stream
from pdjax.sharding import make_mesh
from pdjax.types import Request, SamplingParams
from tests.compiling import quick_environment

ROOT = pathlib.Path(__file__).parents[2]
SEED = 19
PATIENCE_S = 30.0
MOST_SESSIONS = 60  # until a fault has acted
FULL_POOL = 72  # pages
NUM_SLOTS = 16  # of all workers that decode, at most


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


class Trace:
  """The traces of a fault in the books: every event that a state was told of, and whether it counted."""

  def __init__(self):
    self.told: list[tuple[Event, bool]] = []
    self.pages: dict[str, int] = {}  # of the smallest pool of each name
    self.most_requests = 0

  def note(self, state: ClusterState, event: Event, counted: bool) -> None:
    self.told.append((event, counted))
    self.most_requests = max(self.most_requests, len(state.view.requests))
    for name, worker in state.workers.items():
      self.pages[name] = min(worker.num_pages, self.pages.get(name, worker.num_pages))

  def failed(self, error: str, corrupt: bool = False) -> bool:
    return any(isinstance(one, Failed) and error in one.error and one.corrupt == corrupt for one, _ in self.told)

  def lost(self, error: str, returning: bool = False) -> bool:
    return any(
      isinstance(one, WorkerLost) and error in one.error and one.returning == returning for one, _ in self.told
    )

  def late(self) -> int:
    return sum(isinstance(one, TimerDue) and one.timer == 'deadline' for one, _ in self.told)

  def slow(self) -> int:
    trips = [one for one, _ in self.told if isinstance(one, Done) and one.trip is not None]
    return sum(one.ended_s - one.began_s >= 0.9 * SLOW_S for one in trips)

  def of_no_account(self) -> bool:
    return any(isinstance(one, Done) and not counted for one, counted in self.told)

  def long_step(self) -> bool:
    return any(isinstance(one, Done) and one.ended_s - one.began_s >= 0.9 * STEP_STALL_S for one, _ in self.told)

  def not_finite(self) -> bool:
    dones = [one for one, _ in self.told if isinstance(one, Done)]
    ended = [end for one in dones if one.decoded is not None for end in one.decoded.ended]
    errors = [one.error or '' for one in (*(result for done in dones for result in done.results), *ended)]
    return any('not finite' in error for error in errors)

  def given_up(self) -> bool:
    returning = set()
    for one, _ in self.told:
      if isinstance(one, WorkerLost) and one.returning:
        returning.add(one.worker)
      elif isinstance(one, WorkerLost) and one.worker in returning and one.error == NOBODY_BRINGS_IT_BACK:
        return True
      elif isinstance(one, WorkerBack):
        returning.discard(one.worker)
    return False

  def withdrawn(self) -> bool:
    return any(isinstance(one, Withdrawn) for one, _ in self.told)

  def small(self, *names: str) -> bool:
    return any(self.pages.get(name, FULL_POOL) < FULL_POOL for name in names)


TRACES: dict[str, Callable[[Trace], object]] = {
  'transfer_refused': lambda trace: trace.failed('the transport refused it'),
  'transfer_fails': lambda trace: trace.failed('the link broke'),
  'transfer_stalls': Trace.late,
  'transfer_slow': Trace.slow,
  'pages_corrupt': lambda trace: trace.failed('CorruptError', corrupt=True),
  'pages_permuted': lambda trace: trace.failed('CorruptError', corrupt=True),
  'pages_unwritable': lambda trace: trace.lost('cannot be written'),
  'link_slow': lambda trace: trace.slow() > 1,
  'link_stalls': lambda trace: trace.late() > 1,
  'end_late': lambda trace: trace.late() and trace.of_no_account(),
  'end_twice': Trace.of_no_account,
  'end_lost': Trace.late,
  'pass_refused': lambda trace: trace.failed('the step was refused'),
  'pass_refused_halfway': lambda trace: trace.failed('refused halfway') or trace.lost('refused halfway'),
  'pass_fails': lambda trace: trace.lost('failed on its device'),
  'pass_takes_pages': lambda trace: trace.lost('took its pages'),
  'pass_stalls': Trace.long_step,
  'pass_has_nan': Trace.not_finite,
  'lost_in_prefill': lambda trace: trace.lost('it is gone'),
  'lost_in_decode': lambda trace: trace.lost('it is gone'),
  'lost_in_hand_off': lambda trace: trace.lost('it is gone'),
  'worker_restarts': lambda trace: trace.lost('it is gone') and trace.of_no_account(),
  'worker_returns': lambda trace: trace.lost('it is gone', returning=True),
  'worker_given_up': Trace.given_up,
  'prefill_full': lambda trace: trace.small('prefill0', 'both0'),
  'decode_full': lambda trace: trace.small('decode0', 'both0'),
  'both_full': lambda trace: trace.small('both0') or (trace.small('prefill0') and trace.small('decode0')),
  'log_full': lambda trace: trace.told,  # what the log says of itself is what counts it
  'cancels': Trace.withdrawn,
  'cancels_in_hand_off': Trace.withdrawn,
  'storm': lambda trace: trace.withdrawn() and trace.most_requests > NUM_SLOTS,
}


@pytest.mark.parametrize('kind', KINDS)
def test_each_fault_by_itself_acts_and_is_survived(soak, monkeypatch, kind):
  if kind == 'log_full' and not can_fill_disk():
    pytest.skip('there is no /dev/full here')
  patient, *_ = SETTINGS
  monkeypatch.setattr('experiments.soaking.soak.draw_setting', lambda rng: (patient, 0.3))
  trace, apply = Trace(), ClusterState.apply

  def apply_and_note(state, event, now_s):
    counted = apply(state, event, now_s)
    trace.note(state, event, counted)
    return counted

  monkeypatch.setattr(ClusterState, 'apply', apply_and_note)
  one = soak(kinds=(kind,))

  def acted() -> bool:
    return bool((one.tally.faults[kind] or one.injected[kind]) and TRACES[kind](trace))

  watch(one, math.inf, print, patience_s=PATIENCE_S, until=lambda: acted() or one.tally.sessions > MOST_SESSIONS)
  assert acted()
  assert one.tally.well, one.tally.problems
  assert kind in +one.tally.faults and set(+one.tally.faults) <= {kind, *(['cancels'] if kind == 'storm' else [])}
  unserved = {'pass_has_nan': {'error'}, 'cancels': {'cancelled'}, 'cancels_in_hand_off': {'cancelled'}}
  assert set(one.tally.ends) <= {'length', 'stop', *unserved.get(kind, {'cancelled'} if kind == 'storm' else ())}


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
    collected = collect(worker, order, pending)
    decoded = collected.decoded
    if worker.spec.name == 'decode1' and decoded is not None and decoded.counts.any() and not wrong:
      row, tokens = int(decoded.counts.argmax()), decoded.tokens.copy()
      tokens[0, row] = (tokens[0, row] + 1) % MODEL.vocab_size
      wrong.append(order.batch.requests[row])
      return collected._replace(decoded=dataclasses.replace(decoded, tokens=tokens))
    return collected

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
      stream._add(Delta((5,)))
    end(stream, completions)

  monkeypatch.setattr(Stream, '_end', end_with_more)
  tally = waves(soak(kinds=()), 1).tally
  assert given and tally.counts['stream differs'] == 1
  assert f'the deltas of {given[0]} are ' in tally.problems['stream differs'][0]


def test_a_token_after_the_end_is_found(soak, monkeypatch):
  end = Stream._end
  ended = []

  def end_and_note(stream, completions):
    end(stream, completions)
    ended.append(stream)

  monkeypatch.setattr(Stream, '_end', end_and_note)
  is_quiet = Soak._is_quiet
  monkeypatch.setattr(Soak, '_is_quiet', lambda soak, now: ended[0]._add(Delta((5,))) or is_quiet(soak, now))
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


def test_a_wrong_log_probability_is_found(soak, monkeypatch):
  collect = Worker.collect
  wrong = []

  def lie(worker, order, pending):
    collected = collect(worker, order, pending)
    decoded = collected.decoded
    if worker.spec.name != 'both0' and decoded is not None and decoded.logprobs and not wrong:
      row, (told, *others) = next(iter(decoded.logprobs.items()))
      wrong.append(order.batch.requests[row])
      logprobs = {**decoded.logprobs, row: (dataclasses.replace(told, logprob=told.logprob - 0.01), *others)}
      return collected._replace(decoded=dataclasses.replace(decoded, logprobs=logprobs))
    return collected

  monkeypatch.setattr(Worker, 'collect', lie)
  tally = waves(soak(kinds=()), 4).tally
  assert wrong and tally.counts == {'log probabilities': 1}
  assert f' {wrong[0]}: that of token ' in tally.problems['log probabilities'][0]


def test_a_transfer_that_nobody_made_late_is_counted(soak, monkeypatch):
  wait = Parcel.wait
  late = []

  def wait_longer(parcel):
    if not late and threading.current_thread().name == 'pdjax-transfers':
      late.append(parcel)
      time.sleep(2 * DEADLINE_S)
    wait(parcel)

  monkeypatch.setattr('experiments.soaking.soak.draw_setting', lambda rng: (SETTINGS[0], 0.1))
  monkeypatch.setattr(Parcel, 'wait', wait_longer)
  one = waves(soak(kinds=()), 4)
  assert late and one.tally.late >= 1 and one.tally.well, one.tally.problems
  assert f'{one.tally.late} late by themselves' in describe(one.tally)


@pytest.mark.parametrize(
  ('field', 'value', 'sentence'),
  [
    ('due', {'r7': None}, 'KV of r7 is to be sent on.'),
    ('must', {'r7': Cancel('r7')}, "these are to be done: Cancel(request='r7', "),
    ('tasks', [Resend(3)], 'these are to be done: Resend(transfer=3).'),
    ('samples', {'r7': None}, 'the samples r7 are followed.'),
  ],
)
def test_what_is_left_in_the_books_is_found(clusters, field, value, sentence):
  with clusters[0].fresh() as engine:
    state = clusters[0].deployed(engine).empty_state()
  assert leaks(state) == []
  setattr(state.books, field, value)
  (found,) = leaks(state)
  assert found.startswith(sentence)


def test_what_grows_from_session_to_session_is_found_and_told_once(tmp_path):
  resources, held = Resources(settled=1), [jnp.zeros(3)]
  assert resources.grown(0.0) == resources.grown(0.0) == []  # the second is what the others are compared with
  held += [jnp.full(3, index) for index in range(20)]
  (arrays,) = resources.grown(0.0)
  assert arrays.startswith('device arrays were ')
  with contextlib.ExitStack() as files:
    for index in range(20):
      files.enter_context((tmp_path / str(index)).open('w'))
    (opened,) = resources.grown(0.0)
  assert opened.startswith('open files were ')
  released = threading.Event()
  threads = [threading.Thread(target=released.wait, args=(PATIENCE_S,)) for _ in range(20)]
  for thread in threads:
    thread.start()
  (waiting,) = resources.grown(0.0)
  released.set()
  assert waiting.startswith('threads were ') and resources.grown(0.0) == []


def a_log(folder) -> tuple[pathlib.Path, list[Event]]:
  """A log of three turns, and what happened in them."""
  events = [event for now_s in (0.5, 1.25, 2.0) for event in (Turn(now_s), Withdrawn(f'r{now_s}'))]
  with EventLog(folder / EVENTS) as log:
    for event in events:
      log.append(event)
  return folder / EVENTS, events


def cut(path, lines: int) -> None:
  path.write_bytes(b''.join(path.read_bytes().splitlines(keepends=True)[:lines]))


def test_a_log_that_says_from_when_on_it_ends_is_right_and_another_is_not(tmp_path):
  path, events = a_log(tmp_path)
  assert judge_log(tmp_path, events, [], was_full=False) == judge_log(tmp_path, None, [], was_full=True) == []
  note = f'{path} ends early: it has nothing from 1.250 s on, as it cannot be written (OSError: full).'
  (whole,) = judge_log(tmp_path, events, [note], was_full=True)
  assert 'has all lines' in whole.what
  cut(path, 3)  # the turn at 1.25 s is there, what happened in it is not
  assert judge_log(tmp_path, events, [note], was_full=True) == []
  (by_nobody,) = judge_log(tmp_path, events, [note], was_full=False)
  assert 'nobody filled the disk' in by_nobody.what
  (silent,) = judge_log(tmp_path, events, [], was_full=True)
  assert "says 'nothing'" in silent.what
  (too_late,) = judge_log(tmp_path, events, [note.replace('1.250', '2.000')], was_full=True)
  assert 'it has nothing from 1.250 s on' in too_late.what and too_late.kind == 'log'


def test_a_log_with_a_torn_line_or_others_events_is_found(tmp_path):
  path, events = a_log(tmp_path)
  path.write_bytes(path.read_bytes()[:-9])
  (torn,) = judge_log(tmp_path, events, [], was_full=True)
  assert 'torn' in torn.what
  path, events = a_log(tmp_path)
  (other,) = judge_log(tmp_path, events[::-1], [], was_full=True)
  assert 'are not the first events' in other.what


@pytest.mark.skipif(not can_fill_disk(), reason='there is no /dev/full here')
def test_a_log_that_keeps_silent_about_a_full_disk_is_found(soak, monkeypatch):
  monkeypatch.setattr(LinesFile, 'note', None)
  one = soak(kinds=('log_full',))
  watch(one, math.inf, print, patience_s=PATIENCE_S, until=lambda: one.tally.counts['log'] or one.tally.sessions > 40)
  assert set(one.tally.counts) == {'log'} and 'it should say ' in one.tally.problems['log'][0]


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
  assert by_moment['step'] == set(STEP_FAULTS) and set(get_args(StepFault)) == set(STEP_FAULTS.values())
  assert by_moment['link'] == set(LINK_FAULTS) and set(LINK_FAULTS.values()) < set(get_args(Fault))
  assert {name for name, kind in KINDS.items() if kind.moment == 'pools'} == set(FEW_PAGES)


def test_an_unknown_fault_is_refused_with_those_there_are():
  done = subprocess.run(
    [sys.executable, '-m', 'experiments.soak', '--only=pass_stalls,gremlins'],
    cwd=ROOT, env=quick_environment(), capture_output=True, text=True, timeout=120,
  )  # fmt: skip
  assert done.returncode == 1 and '--only names gremlins, expected some of transfer_refused, ' in done.stderr


def test_dice_draw_what_is_wanted_as_often_as_is_wanted_and_count_what_acted():
  counts = Counter()
  dice = Dice(random.Random(0), 0.5, ['transfer_fails', 'end_late', 'pass_refused', 'pass_stalls'], counts)
  drawn = Counter(dice.draw(moment) for moment in RATES for _ in range(2000))
  assert set(drawn) == {None, 'transfer_fails', 'end_late', 'pass_refused', 'pass_stalls'} and not counts
  assert 900 < drawn['transfer_fails'] < 1100 and 200 < drawn['pass_refused'] + drawn['pass_stalls'] < 400
  threads = [threading.Thread(target=lambda: [dice.count('transfer_fails') for _ in range(100)]) for _ in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert counts == {'transfer_fails': 400}
  assert grouped(counts)['transfers'] == 400 and grouped(counts)['logs'] == 0


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
  for harmless in ('cancels', 'storm', 'log_full', 'pass_stalls', 'both_full', 'worker_returns', 'worker_restarts'):
    assert not short.allows(away, Counter({harmless: 1}))
  again = "worker 'decode0' began another incarnation"
  assert short.allows(again, Counter(worker_returns=1)) and not short.allows(again, Counter(storm=1))


def test_a_transfer_that_is_late_by_itself_explains_an_error_and_none_explains_one_without():
  patient, _, short, _ = SETTINGS
  late = 'the transfer did not end within 0.4 s'
  assert short.allows(late, Counter(), late=True) and not patient.allows(late, Counter(), late=True)
  assert not short.allows(late, Counter(transfer_fails=1))


def test_what_nothing_mends_may_end_a_request_whatever_the_settings_say():
  nan = "worker 'decode0' computed logits that are not finite (NaN or infinite), so there is no token to choose"
  for setting in SETTINGS:
    assert setting.allows(nan, Counter(pass_has_nan=1)) and not setting.allows(nan, Counter(pass_fails=1))


class Incarnations:
  """An engine that knows in which incarnation a worker is."""

  def __init__(self):
    self.number = 1

  def incarnation(self, worker: str) -> int:
    return self.number

  def break_worker(self, worker: str) -> None:
    self.number += 1


def test_a_worker_that_is_given_up_is_told_so_while_it_is_away_and_only_then():
  acted, later = [], []
  losses = Losses(Incarnations(), lambda after_s, event: later.append((after_s, event)), acted.append)
  loss = Loss('worker_given_up', down_s=0.4, returning=True, given_up_after_s=0.1)
  lost, back = WorkerLost('decode0', 1.0, 'it is gone'), WorkerBack('decode0', 1.0, 2)
  losses.lose('decode0', loss)
  assert losses.told(lost) == [dataclasses.replace(lost, returning=True)] and losses.told(back) == []
  assert later[0] == (0.4, back) and acted == ['worker_given_up']
  after_s, given_up = later[1]
  assert after_s == 0.1 and losses.told(given_up) == [given_up] and not given_up.returning
  assert losses.told(back) == [back]
  losses.lose('decode0', loss)
  losses.told(lost), losses.told(dataclasses.replace(back, incarnation=3))
  losses.told(dataclasses.replace(back, incarnation=4))  # by a step that failed meanwhile
  assert losses.told(given_up) == []


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
  assert '1,202 faults (1,200 transfers, 2 steps), 0 wrong tokens' in line and '3 leaks' in line
  assert os.linesep not in line
