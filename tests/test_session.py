"""A live session: threads and tasks submit, read and cancel while the loop runs, and everything ends."""

import asyncio
import collections
import contextlib
import dataclasses
import functools
import gc
import itertools
import json
import random
import threading
import time

import pytest

import pdjax
from pdjax.answers import read_answers
from pdjax.completions import complete
from pdjax.deployment import Deployment
from pdjax.engine.build import Built
from pdjax.engine.engine import Engine
from pdjax.engine.runner import Runner
from pdjax.engine.worker import Worker
from pdjax.metrics import run_log
from pdjax.metrics.event_log import read_events
from pdjax.opened_model import OpenedModel
from pdjax.policies import Disaggregated
from pdjax.serving import PolicyError, StuckError
from pdjax.serving.events import Arrived, Done, Finished, Started, Turn, Withdrawn, WorkerLost
from pdjax.serving.orders import StepOrder
from pdjax.types import FaultSpec, Request, SamplingParams
from pdjax.workload import Live
from tests.engine.cluster import Cluster, assert_all_is_free
from tests.engine.conftest import shared
from tests.engine.plain import generate
from tests.full_disk import FullDisk
from tests.tiny import TINY, byte_tokenizer, prompt

WAIT_S = 30.0  # for what takes milliseconds: past it, something hangs


@pytest.fixture(scope='module')
def cluster() -> Cluster:
  return shared('2P2D').only('prefill0', 'decode0')


@pytest.fixture(autouse=True)
def no_thread_is_left():
  before = set(threading.enumerate())
  yield
  new = set(threading.enumerate()) - before
  assert [thread.name for thread in new if thread.name.startswith('pdjax')] == []


@pytest.fixture
def begin(cluster, monkeypatch):
  """Begins sessions on the compiled cluster; each must leave every page and slot free."""
  states = []
  empty_state = Deployment.empty_state

  def remember(deployment):
    states.append(empty_state(deployment))
    return states[-1]

  monkeypatch.setattr(Deployment, 'empty_state', remember)

  def make(policy=None, broken: bool = False, faults: FaultSpec = FaultSpec(), **kwargs) -> pdjax.Session:
    if broken:
      monkeypatch.setattr(Deployment, 'empty_state', empty_state)
    for worker in cluster.workers.values():
      worker.forget_all()
    engine = Engine(list(cluster.workers.values()), cluster.transports)
    config = dataclasses.replace(cluster.config, policy=policy or cluster.config.policy, faults=faults)
    built = Built(
      engine,
      cluster.specs,
      cluster.transfer,
      config.definite_dtype,
      dict.fromkeys(cluster.workers, ()),
      cluster.warm_up,
    )
    return pdjax.Session(Deployment(config, OpenedModel(cluster.model, None, byte_tokenizer()), built), **kwargs)

  yield make
  for state in states:
    assert_all_is_free(state)


def ask(name: str, length: int = 6, max_tokens: int = 6, **sampling) -> Request:
  return Request(name, prompt(length, seed=length), SamplingParams(max_tokens=max_tokens, ignore_eos=True, **sampling))


def expected(request: Request) -> tuple[int, ...]:
  return generate(TINY, request)[0]


def endless(name: str) -> Request:
  return ask(name, length=3, max_tokens=60)


class Asked:
  """Disaggregated serving that calls a function whenever it is asked."""

  def __init__(self, before=lambda state: None, after=lambda state, actions: None, **fields):
    self._policy = Disaggregated(**{'max_prefill_tokens': 16} | fields)
    self._before, self._after = before, after

  def decide(self, view):
    self._before(view)
    actions = self._policy.decide(view)
    self._after(view, actions)
    return actions


# ---------------------------------------------------------------------------- seeds


def test_requests_without_a_seed_draw_one_in_the_order_of_arrival_and_tell_it(begin):
  one = ask('one', temperature=1.5, max_tokens=12)
  drawn = []
  for run_seed in (None, 0, 5):
    with begin(seed=run_seed) as session:
      asked = [session.submit(request) for request in (one, ask('two', temperature=1.5, seed=9))]
      asked += [session.submit(one.prompt, one.sampling) for _ in range(2)]
      done = [stream.result(WAIT_S) for stream in asked]
      assert session.report().config['seed'] == (run_seed or 0)
    drawn.append([completion.request.sampling.seed for completion in done])
    assert drawn[-1] == [
      stream.request.seeded(run_seed or 0, number).sampling.seed for number, stream in enumerate(asked)
    ]
    assert len({completion.token_ids for completion in (done[0], *done[2:])}) == 3
    for completion in done:
      assert completion.token_ids == expected(completion.request)
  assert drawn[0] == drawn[1] and drawn[2][1] == 9 and drawn[2][0] != drawn[0][0]


def test_half_a_surrogate_pair_is_refused_and_the_session_goes_on(begin):
  with begin() as session:
    for bad in ('smile \ud83d', [{'role': 'user', 'content': '\ude00'}]):
      with pytest.raises(ValueError):
        session.submit(bad)
    with pytest.raises(ValueError, match='half a surrogate pair'):
      session.submit(prompt(3), SamplingParams(stop=('\ud83d',)))
    assert session.submit(prompt(3)).result(WAIT_S).request.id == 'request-0'


# ---------------------------------------------------------------------------- the bar


def test_two_hundred_requests_of_twenty_threads_with_random_cancels_all_end_and_the_others_are_exact(begin):
  streams, lock = [], threading.Lock()

  def user(number: int) -> None:
    chance = random.Random(number)
    for i in range(10):
      length, seed = chance.choice((1, 3, 9, 17, 40)), chance.randrange(4)
      request = Request(
        f'{number}-{i}', prompt(length, seed), SamplingParams(chance.randrange(1, 9), chance.randrange(2), seed=seed)
      )
      stream = session.submit(request)
      with lock:
        streams.append(stream)
      doomed = chance.random() < 0.4
      if doomed and chance.random() < 0.5:
        stream.cancel()
      got = []
      for delta in stream:
        got += delta.tokens
        if doomed and chance.random() < 0.5:
          stream.cancel()
      assert tuple(got) == stream.result(WAIT_S).token_ids

  failures = []
  monitored = functools.partial(_collect_failures, user, failures)
  with begin() as session:
    threads = [threading.Thread(target=monitored, args=(number,)) for number in range(20)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join(WAIT_S)
      assert not thread.is_alive()
  assert failures == []
  assert len(streams) == 200
  ends = collections.Counter(stream.finish_reason for stream in streams)
  assert ends['cancelled'] > 20 and ends['length'] + ends['stop'] > 80
  for stream in streams:
    one, (tokens, reason) = stream.result(), generate(TINY, stream.request)
    if one.finish_reason == 'cancelled':
      assert one.token_ids == tokens[: len(one.token_ids)]
    else:
      assert (one.token_ids, one.finish_reason) == (tokens, reason)
    assert len(one.token_times_s) == len(one.token_ids)
  report = session.report()
  assert report.num_prompts == 200 and report.finish_reasons['cancelled'] == ends['cancelled']


def _collect_failures(function, failures, *args) -> None:
  try:
    function(*args)
  except BaseException as error:
    failures.append(error)


# ---------------------------------------------------------------------------- streams


def test_deltas_come_as_they_are_made_and_make_up_the_completion(begin):
  request = ask('a', 17, 8)
  with begin() as session:
    stream = session.submit(request)
    assert stream.request.id == 'a'
    deltas = list(stream)
    assert stream.finish_reason == 'length' and list(stream) == []
  assert len(deltas) == 8 and all(delta.sample == 0 for delta in deltas)
  one = stream.result()
  assert one.token_ids == sum((delta.tokens for delta in deltas), ()) == expected(request)
  assert one.text == ''.join(delta.text for delta in deltas) == byte_tokenizer().decode(one.token_ids)
  assert 0 < one.request.arrival_s < one.token_times_s[0] < one.token_times_s[-1]


def test_texts_messages_and_token_ids_are_taken_and_other_things_refused(begin):
  sampling = SamplingParams(max_tokens=2)
  with begin() as session:
    streams = [session.submit('bees', sampling), session.submit([5, 6, 7], sampling)]
    assert streams[0].request.prompt == tuple(byte_tokenizer().encode('bees'))
    for wrong, match in (('', 'the prompt is empty'), ([], 'the prompt is empty'), ([2.5], 'expected a text'),
                         ([{'role': 'user', 'content': 'bees'}], 'no chat template')):  # fmt: skip
      with pytest.raises(ValueError, match=match):
        session.submit(wrong)
    with pytest.raises(ValueError, match='sampling parameters of its own'):
      session.submit(ask('x'), sampling)
    named = session.submit(dataclasses.replace(ask('request-2'), prompt=list(prompt(4))))
    assert session.submit([5], sampling).request.id == 'request-3'
    for name in ('request-2', 'request-0'):
      with pytest.raises(ValueError, match=f"request id '{name}' was used before"):
        session.submit(ask(name))
    assert named.result(WAIT_S).token_ids == expected(named.request)
  assert all(len(stream.result().token_ids) == 2 or stream.finish_reason == 'stop' for stream in streams)


def test_a_request_that_cannot_be_served_ends_its_own_stream(begin):
  with begin() as session:
    good, bad = session.submit(ask('good')), session.submit(ask('bad', 70))
    with pytest.raises(pdjax.RequestError, match=r"request 'bad' ended with 'rejected': the prompt has 70 tokens"):
      list(bad)
    assert bad.result(WAIT_S).finish_reason == 'rejected'
    assert good.result(WAIT_S).token_ids == expected(good.request)


def test_waiting_has_an_end_if_one_is_asked_for(begin):
  with begin(Asked(lambda state: time.sleep(0.02))) as session:
    stream = session.submit(endless('a'))
    with pytest.raises(TimeoutError, match=r"request 'a' has not ended within 0\.01 s"):
      stream.result(timeout=0.01)
    assert stream.finish_reason is None
    stream.cancel()
    stream.cancel()
    assert stream.result(WAIT_S).finish_reason == 'cancelled'
    stream.cancel()


def test_a_stream_that_nobody_reads_or_keeps_is_served_all_the_same(begin):
  with begin() as session:
    session.submit(ask('dropped'))
    for delta in session.submit(ask('left')):
      assert delta.tokens
      break
    gc.collect()
    stream = session.submit(ask('kept'))
    next(stream)
    assert sum((delta.tokens for delta in stream), ()) == expected(stream.request)[1:]
  assert session.report().completed == 3


def test_samples_come_with_their_index_and_end_together(begin):
  request = ask('many', 9, 5, temperature=1.0, n=3)
  with begin() as session:
    stream, other = session.submit(request), session.submit(dataclasses.replace(request, id='other'))
    got = collections.defaultdict(list)
    for delta in stream:
      got[delta.sample] += delta.tokens
    results = stream.results(WAIT_S)
    next(other)
    other.cancel()
    assert [one.finish_reason for one in other.results(WAIT_S)] == ['cancelled'] * 3
  for index, (one, sample) in enumerate(zip(results, request.seeded(0, 0).samples(), strict=True)):
    assert one.request.id == sample.id
    assert one.token_ids == tuple(got[index]) == generate(TINY, sample)[0]
  assert stream.result() == results[0]
  assert len({one.token_ids for one in results}) == 3


def test_a_deployment_whose_session_is_closed_begins_no_other(begin):
  with begin() as session:
    deployment = session._deployment
  with pytest.raises(ValueError, match='the engine is closed'):
    pdjax.Session(deployment).start()


# ---------------------------------------------------------------------------- asyncio


def test_tasks_read_side_by_side_cancel_and_wait(begin):
  async def read(stream):
    return sum([delta.tokens async for delta in stream], ())

  async def main(session):
    asked = [ask(f'r{i}', length) for i, length in enumerate((1, 9, 17))]
    reading = [asyncio.create_task(read(session.submit(request))) for request in asked]
    waiting = session.submit(ask('waited'))
    doomed = session.submit(endless('doomed'))
    first = await anext(doomed)
    doomed.cancel()
    rest = await read(doomed)
    assert (await doomed).token_ids == first.tokens + rest
    assert (await waiting).token_ids == expected(waiting.request)
    with pytest.raises(pdjax.RequestError, match='rejected'):
      await read(session.submit(ask('bad', 70)))
    return list(zip(asked, await asyncio.gather(*reading), strict=True))

  with begin() as session:
    for request, tokens in asyncio.run(asyncio.wait_for(main(session), WAIT_S)):
      assert tokens == expected(request)


def test_an_event_loop_that_has_gone_does_no_harm(begin):
  async def give_up(stream):
    with pytest.raises(TimeoutError):
      await asyncio.wait_for(stream, 0.02)

  gate = threading.Event()
  with begin(Asked(lambda state: gate.wait(WAIT_S))) as session:
    stream = session.submit(ask('a'))
    asyncio.run(give_up(stream))
    gone = asyncio.new_event_loop()
    waiting = gone.create_task(anext(stream))
    gone.run_until_complete(asyncio.sleep(0.01))
    waiting._log_destroy_pending = False
    gone.close()
    gate.set()
    assert stream.result(WAIT_S).token_ids == expected(stream.request)


# ---------------------------------------------------------------------------- cancelling


def orders_after(events, position: int, request: str) -> tuple[int, int]:
  """Chunks and decode calls of a request that were dispatched from a position of the log on."""
  orders = [event.order for event in events[position:] if isinstance(event, Started)]
  steps = [order for order in orders if isinstance(order, StepOrder)]
  chunks = sum(chunk.request.id == request for order in steps for chunk in order.chunks)
  return chunks, sum(request in order.batch.requests for order in steps)


@pytest.mark.parametrize('moment', [1, 2, 3, 4, 6, 9])
def test_after_a_cancel_no_more_than_a_chunk_and_a_decode_call_is_dispatched(begin, moment):
  """Cancelled while the policy makes up its answer, the worst moment; it has had so many of them before."""
  asked, positions, streams = [], [], []

  def cancel(state, actions):
    if 'a' in state.requests:
      asked.append(actions)
      if len(asked) == moment:
        positions.append(len(session.events))
        streams[0].cancel()

  gate = threading.Event()
  with begin(Asked(lambda state: gate.wait(WAIT_S), cancel, max_prefill_tokens=7)) as session:
    streams.append(session.submit(ask('a', length=40, max_tokens=20)))
    other = session.submit(ask('b'))
    gate.set()
    assert streams[0].result(WAIT_S).finish_reason == 'cancelled'
    assert other.result(WAIT_S).token_ids == expected(other.request)
  chunks, decodes = orders_after(session.events, positions[0], 'a')
  assert chunks <= 1 and decodes <= 1
  in_log = next(i for i, event in enumerate(session.events) if isinstance(event, Withdrawn))
  assert orders_after(session.events, in_log, 'a') == (0, 0)


def test_what_a_cancelled_request_streamed_is_what_its_completion_says(begin):
  cancelled = 0
  with begin() as session:
    for i in range(12):
      stream = session.submit(ask(f'r{i}', 9, 30))
      got = []
      for delta in stream:
        got += delta.tokens
        if len(got) > i // 2:
          stream.cancel()
      one = stream.result(WAIT_S)
      assert one.token_ids == tuple(got) == expected(stream.request)[: len(got)]
      assert one.finish_reason == ('length' if len(got) == 30 else 'cancelled')  # a slow reader may be too late
      cancelled += one.finish_reason == 'cancelled'
  assert cancelled


# ---------------------------------------------------------------------------- beginning and end


def test_leaving_the_block_lets_requests_finish_and_nothing_comes_after(begin):
  with begin() as session:
    streams = [session.submit(ask(f'r{i}', max_tokens=20)) for i in range(9)]
  assert [stream.result(0).token_ids for stream in streams] == [expected(stream.request) for stream in streams]
  with pytest.raises(pdjax.SessionError, match='the session is closed'):
    session.submit(ask('late'))
  session.close()
  with pytest.raises(pdjax.SessionError, match='started before'):
    session.start()


def test_leaving_the_block_by_an_exception_cancels(begin):
  with pytest.raises(KeyboardInterrupt), begin() as session:
    streams = [session.submit(endless(f'r{i}')) for i in range(9)]
    raise KeyboardInterrupt
  assert {stream.result(0).finish_reason for stream in streams} == {'cancelled'}
  assert all(list(stream) or not stream.result().token_ids for stream in streams)


def test_closing_with_cancel_ends_what_is_under_way(begin):
  session = begin().start()
  streams = [session.submit(endless(f'r{i}')) for i in range(9)]
  session.close(cancel=True)
  assert {stream.result(0).finish_reason for stream in streams} == {'cancelled'}


def test_an_interrupted_wait_for_the_end_cancels_and_still_ends_everything(begin, monkeypatch):
  gate = threading.Event()
  session = begin(Asked(lambda state: gate.wait(WAIT_S))).start()
  stream = session.submit(endless('a'))
  join = threading.Thread.join
  calls = []

  def interrupted(thread, *args):
    calls.append(thread.name)
    gate.set()
    if len(calls) == 1:
      raise KeyboardInterrupt
    join(thread, *args)

  monkeypatch.setattr(threading.Thread, 'join', interrupted)
  with pytest.raises(KeyboardInterrupt):
    session.close()
  monkeypatch.undo()
  assert stream.result(0).finish_reason in ('cancelled', 'length')


def test_whoever_submits_while_it_closes_is_served_or_told(begin):
  session = begin().start()
  served, told = [], []

  def submit_until_told(number: int) -> None:
    with contextlib.suppress(pdjax.SessionError):
      for i in range(10_000):
        served.append(session.submit(ask(f'{number}-{i}', 2, 1)))
    told.append(number)

  threads = [threading.Thread(target=submit_until_told, args=(number,)) for number in range(6)]
  for thread in threads:
    thread.start()
  while len(served) < 20:
    time.sleep(0.001)
  session.close()
  for thread in threads:
    thread.join(WAIT_S)
  assert sorted(told) == list(range(6))
  assert {stream.result(0).finish_reason for stream in served} <= {'length'}


def test_a_session_that_has_not_begun_says_so():
  session = pdjax.Session()
  with pytest.raises(pdjax.SessionError, match=r'has not begun; use it in a `with` statement'):
    session.submit('bees')
  with pytest.raises(pdjax.SessionError, match='has not begun, so there is nothing to report'):
    session.report()
  assert session.events == ()
  session.close()
  with pytest.raises(ValueError, match=r"a config and the checkpoint 'x\.gguf' are both given"):
    pdjax.Session(pdjax.ServingConfig(workers=pdjax.colocated_pool(1), model=TINY), checkpoint='x.gguf').start()


def test_a_deployment_and_a_checkpoint_are_not_taken_together(begin, tmp_path):
  deployment = begin()._config
  with contextlib.closing(deployment):
    session = pdjax.Session(deployment, checkpoint='x.gguf', workdir=tmp_path / 'out')
    with pytest.raises(ValueError, match=r"a deployment and the checkpoint 'x\.gguf' are both given; .*'random'"):
      session.start()
  assert not (tmp_path / 'out').exists()


# ---------------------------------------------------------------------------- breaking down


def test_what_breaks_the_loop_reaches_everyone_who_waits_and_everyone_who_comes(begin):
  turns, submitted = itertools.count(), threading.Event()

  def fail(state):
    if next(turns) > 20:  # the others are under way, and must not end before
      submitted.wait(WAIT_S)
    if 'last' in state.requests:
      raise ZeroDivisionError('an idea that does not work')

  told = []

  def wait(function) -> None:
    try:
      function()
    except pdjax.SessionError as error:
      told.append(error)

  async def main(stream):
    reading, waiting = asyncio.create_task(anext(stream)), asyncio.ensure_future(stream)
    for task in (reading, waiting):
      with contextlib.suppress(StopAsyncIteration):
        while True:
          await task
          task = asyncio.create_task(anext(stream))

  session = begin(Asked(fail), broken=True).start()
  streams = [session.submit(endless(f'r{i}')) for i in range(6)]
  jobs = [lambda s=stream: list(s) for stream in streams[:2]]
  jobs += [lambda s=stream: s.result() for stream in streams[2:4]]
  jobs += [lambda s=stream: asyncio.run(main(s)) for stream in streams[4:]]
  threads = [threading.Thread(target=wait, args=(job,)) for job in jobs]
  for thread in threads:
    thread.start()
  streams.append(session.submit(ask('last')))
  submitted.set()
  for thread in threads:
    thread.join(WAIT_S)
    assert not thread.is_alive()
  assert len(told) == 6
  wait(lambda: session.submit(ask('more')))
  wait(streams[-1].result)
  assert len(told) == 8
  for error in told:
    assert isinstance(error.__cause__, ZeroDivisionError)
    assert str(error) == 'the session broke down: ZeroDivisionError: an idea that does not work'
  session.close()  # everyone has been told
  assert session.report().finish_reasons['unfinished'] >= 1


def test_an_action_that_cannot_be_done_is_told_on_leaving_if_nobody_waited(begin):
  class Confused:
    def decide(self, view):
      return [pdjax.Transfer('nobody', 'decode0')] if view.waiting else []

  session = begin(Confused(), broken=True)
  with pytest.raises(pdjax.SessionError, match=r"broke down: PolicyError: .*'nobody' is unknown") as caught, session:
    session.submit(ask('a'))
  assert isinstance(caught.value.__cause__, PolicyError)


def test_requests_that_a_policy_holds_back_are_told_in_the_end_but_may_wait_for_others(begin, monkeypatch):
  monkeypatch.setattr('pdjax.session.Live', functools.partial(Live, patience_s=0.2))

  class Pairs(Disaggregated):
    """Serves nobody alone."""

    def decide(self, view):
      return super().decide(view) if len(view.waiting) != 1 else []

  session = begin(Pairs(), broken=True).start()
  first = session.submit(ask('a'))
  time.sleep(0.05)
  assert first.finish_reason is None
  second = session.submit(ask('b'))
  assert [stream.result(WAIT_S).token_ids for stream in (first, second)] == [expected(ask('a')), expected(ask('b'))]
  time.sleep(0.3)  # nobody is there, so nobody is held back
  third = session.submit(ask('c'))
  with pytest.raises(pdjax.SessionError, match=r'StuckError: 1 requests wait .* c \(waiting') as caught:
    third.result(WAIT_S)
  assert isinstance(caught.value.__cause__, StuckError)
  session.close()


def test_an_idle_session_sleeps(begin, monkeypatch):
  monkeypatch.setattr('pdjax.session.Live', functools.partial(Live, patience_s=0.02))
  with begin() as session:
    session.submit(ask('a')).result(WAIT_S)
    time.sleep(0.05)
    turns = sum(isinstance(event, Turn) for event in session.events)
    time.sleep(0.2)
    assert sum(isinstance(event, Turn) for event in session.events) == turns
    assert session.submit(ask('b')).result(WAIT_S).finish_reason == 'length'


@pytest.mark.parametrize('worker', ['recompute', 'fail'])
def test_a_lost_worker_ends_what_it_held_or_begins_it_again_as_the_config_says(begin, monkeypatch, worker):
  collect = Worker.collect

  def fail_once(worker, order, pending):
    if order.decodes and not lost:
      lost.append(worker.spec.name)
      raise RuntimeError('the device is on fire')
    return collect(worker, order, pending)

  lost: list[str] = []
  monkeypatch.setattr(Worker, 'collect', fail_once)
  with begin(faults=FaultSpec(worker=worker)) as session:
    held = session.submit(endless('held'))
    if worker == 'fail':
      with pytest.raises(pdjax.RequestError, match="request 'held' ended with 'error': RuntimeError: the device is on"):
        list(held)
    else:
      deltas = list(held)
      assert tuple(token for delta in deltas for token in delta.tokens) == expected(held.request)
      assert ''.join(delta.text for delta in deltas) == held.result().text
    later = session.submit(ask('later'))
    assert later.result(WAIT_S).token_ids == expected(later.request)
  assert lost == ['decode0'] and sum(isinstance(event, WorkerLost) for event in session.events) == 1
  assert held.result().finish_reason == ('error' if worker == 'fail' else 'length')


@pytest.mark.parametrize('where', ['collect', 'rebuild'])
def test_what_breaks_the_engine_itself_breaks_the_session(begin, monkeypatch, where):
  """A waiting thread that fails where it must not, and a worker that cannot be rebuilt."""

  def explode(*args, **kwargs):
    raise MemoryError('no room at all')

  if where == 'collect':
    monkeypatch.setattr(Runner, '_collect', explode)
  else:
    monkeypatch.setattr(Worker, 'collect', explode)
    monkeypatch.setattr(Runner, 'restart', explode)
  with begin(broken=True) as session, pytest.raises(pdjax.SessionError, match='MemoryError: no room at all'):
    session.submit(ask('a')).result(WAIT_S)


# ---------------------------------------------------------------------------- report and log


def test_the_report_can_be_had_at_any_time_and_the_folder_has_the_last(begin, tmp_path):
  with begin(workdir=tmp_path) as session:
    assert session.report().num_prompts == 0
    session.submit(ask('a')).result(WAIT_S)
    assert session.report().completed == 1
    session.submit(ask('b'))
  report = session.report()
  assert (report.completed, report.backend, report.num_transfers > 0) == (2, 'engine', True)
  assert json.loads((tmp_path / 'report.json').read_text())['completed'] == 2
  assert len(list(read_events(tmp_path / 'events.jsonl'))) == len(session.events)
  rows = read_answers(tmp_path / 'answers.jsonl')
  assert sorted((row['id'], tuple(row['output_token_ids'])) for row in rows) == sorted(
    (one.request.id, one.token_ids) for one in complete(session.events, has_text=True)
  )


@pytest.mark.parametrize('log', ['full', 'summary', 'off'])
def test_a_session_that_keeps_no_events_serves_and_has_of_its_log_what_was_asked_for(begin, tmp_path, log):
  with begin(workdir=tmp_path, log=log, keep_events=False) as session:
    stream = session.submit(ask('a'))
    assert stream.result(WAIT_S).token_ids == expected(stream.request)
    assert session._open == {}
  assert session.events == ()
  found = {path.name for path in tmp_path.iterdir()}
  reports = {'report.json', 'report.html', 'trace.json', 'metrics.prom'}
  left = {'full': {'events.jsonl', *reports}, 'summary': reports, 'off': set()}[log]
  assert found == {'run.json', 'answers.jsonl', *left}
  if log == 'off':
    with pytest.raises(pdjax.SessionError, match='has no log'):
      session.report()
  else:
    assert session.report().completed == json.loads((tmp_path / 'report.json').read_text())['completed'] == 1
  if log == 'full':
    assert '"Finished"' in (tmp_path / 'events.jsonl').read_text()


def test_a_session_lets_go_of_its_events_once_many_requests_have_come(begin, monkeypatch):
  monkeypatch.setattr(run_log, 'MOST_KEPT', 3)
  with begin() as session:
    for name in 'ab':
      session.submit(ask(name)).result(WAIT_S)
    assert session.report().completed == 2 and session.events
    session.submit(ask('c')).result(WAIT_S)
    assert session.events == ()
  report = session.report()
  assert report.completed == 3 and report.timeline.requests.ids == ['a', 'b', 'c']


@pytest.mark.parametrize('keep', [True, False])
def test_a_full_disk_ends_the_log_and_no_stream(begin, tmp_path, monkeypatch, keep):
  disk = FullDisk(monkeypatch, 'events.jsonl', room=3000)
  with begin(workdir=tmp_path, keep_events=keep) as session:
    for name in 'abc':
      stream = session.submit(ask(name))
      assert stream.result(WAIT_S).token_ids == expected(stream.request)
  lines = (tmp_path / 'events.jsonl').read_text().splitlines()
  assert disk.room < 3000 and [json.loads(line) for line in lines]
  if keep:
    for notes in (session.report().notes, json.loads((tmp_path / 'report.json').read_text())['notes']):
      (note,) = (note for note in notes if 'ends early' in note)
      assert str(tmp_path / 'events.jsonl') in note and 'No space left on device' in note


def test_a_report_that_cannot_be_written_ends_no_session(begin, tmp_path):
  (tmp_path / 'report.json').mkdir()
  with begin(workdir=tmp_path) as session:
    session.submit(ask('a')).result(WAIT_S)
  assert session.report().completed == 1 and (tmp_path / 'report.html').is_file()


def test_a_second_session_leaves_what_the_first_wrote(begin, tmp_path):
  for name in 'ab':
    with begin(workdir=tmp_path / 'out') as session:
      session.submit(ask(name)).result(WAIT_S)
  assert '"a"' in (tmp_path / 'out.1' / 'events.jsonl').read_text()
  assert '"b"' in (tmp_path / 'out' / 'events.jsonl').read_text()
  other = begin(workdir=tmp_path / 'out')
  with begin(workdir=tmp_path / 'out'), pytest.raises(ValueError, match='is in use by another run'):
    other.start()
  other._config.built.backend.close()


def test_every_arrival_is_in_the_first_turn_after_it(begin):
  with begin() as session:
    for i in range(20):
      session.submit(ask(f'r{i}', 2, 2))
  before_s, now_s, ends = 0.0, 0.0, 0
  for event in session.events:
    match event:
      case Turn():
        before_s, now_s = now_s, event.now_s
      case Arrived(request):
        assert before_s < request.arrival_s <= now_s
      case Done():
        assert before_s < event.ended_s <= now_s
      case Finished():
        ends += 1
  assert ends == 20


def test_cancelling_all_on_leaving_reaches_those_that_a_policy_holds_back(begin, monkeypatch):
  """A closed queue lets the loop wait for nobody, so they have to be cancelled before it closes."""

  class Pairs(Disaggregated):
    def decide(self, view):
      return super().decide(view) if len(view.waiting) != 1 else []

  close = Live.close
  for late in (pdjax.Session._cancel_all, close):
    name, owner = (late.__name__, pdjax.Session if late is not close else Live)

    def slowly(self, late=late):
      time.sleep(0.02)
      late(self)

    monkeypatch.setattr(owner, name, slowly)
    session = begin(Pairs()).start()
    stream = session.submit(ask('alone'))
    session.close(cancel=True)
    assert stream.result(WAIT_S).finish_reason == 'cancelled'
    monkeypatch.setattr(owner, name, late)


def test_a_session_is_entered_and_left_in_asyncio_while_other_tasks_go_on(begin):
  read, ticks = [], []

  async def reader(stream):
    async for delta in stream:
      read.extend(delta.tokens)

  async def ticker():
    while True:
      ticks.append(len(read))
      await asyncio.sleep(0.001)

  async def main():
    async with begin(Asked(lambda state: time.sleep(0.005))) as session:
      task, other = asyncio.create_task(reader(session.submit(ask('a', 3, 20)))), asyncio.create_task(ticker())
      session.submit(ask('b', 3, 20))
    await task
    other.cancel()

  asyncio.run(main())
  assert len(read) == 20
  assert len(set(ticks)) > 5  # the block was left while tokens came one after another


def test_waits_that_were_given_up_leave_nothing_behind(begin):
  gate = threading.Event()

  async def impatient(stream):
    for _ in range(20):
      with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(anext(stream), 0.001)

  with begin(Asked(lambda state: gate.wait(WAIT_S))) as session:
    stream = session.submit(ask('a'))
    asyncio.run(impatient(stream))
    assert not stream._tasks
    gate.set()


def test_a_second_close_writes_nothing_anew(begin, tmp_path):
  with begin(workdir=tmp_path) as session:
    session.submit(ask('a')).result(WAIT_S)
  (tmp_path / 'report.json').unlink()
  session.close()
  assert not (tmp_path / 'report.json').exists()
