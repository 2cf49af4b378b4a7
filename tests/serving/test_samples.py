"""Samples of one prompt, which cut across the files of `serving`: computed once, moved once, each with its own end."""

import dataclasses
import random
from collections import Counter

import pytest

from pdjax.metrics import Report
from pdjax.serving import ALL, Cancel, Chunk, Phase, PolicyError, Reject, Step, Transfer, serve
from pdjax.serving.events import Arrived, Done, Event, Failed, Finished, Started, Turn, Withdrawn, WorkerLost
from pdjax.serving.orders import AbandonOrder, StepOrder, TransferOrder
from pdjax.simulator import started
from pdjax.types import Request, SamplingParams, TransferSpec, colocated_pool, decode_pool, prefill_pool
from pdjax.workload import Listed
from tests.serving.driver import SIZES, TINY, Driver, end_well
from tests.test_simulator import Case, HandCost, Unlucky

THREE = ('a', 'a#1', 'a#2')


def prefilled(prompt_len: int = 10, finish=None, send_to=None, **options) -> tuple[Driver, list]:
  """Three samples with the prompt computed and the first token there; the orders still under way."""
  cluster = Driver(**options)
  cluster.arrive('a', prompt_len=prompt_len, n=3)
  step, *transfers = cluster.start(Step('prefill0', (Chunk('a', 0, prompt_len, send_to),)))
  cluster.end(step, {'a': 1}, {'a': finish} if finish else {})
  return cluster, transfers


def admissions(order: StepOrder) -> dict:
  return {join.request: join.admission for join in order.joins}


# ---------------------------------------------------------------------------- requests


def test_samples_differ_in_name_and_seed_alone():
  request = Request('a', (1, 2), SamplingParams(n=3, temperature=0.7, seed=5), 1.5, session='s')
  first, *others = request.samples()
  assert first == dataclasses.replace(request, sampling=dataclasses.replace(request.sampling, n=1))
  assert [one.id for one in others] == ['a#1', 'a#2'] and {one.sample_of for one in others} == {'a'}
  for one in others:
    seedless = dataclasses.replace(one.sampling, seed=5)
    assert dataclasses.replace(one, id='a', sample_of=None, sampling=seedless) == first
  assert first.samples() == (first,)


def test_seeds_of_samples_and_of_neighbours_do_not_meet():
  seeds = [
    sample.sampling.seed
    for seed in [*range(100), 2**32, 2**63 - 1]
    for sample in Request('a', (1,), SamplingParams(n=50, seed=seed)).samples()
  ]
  assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**63 for seed in seeds)


# ---------------------------------------------------------------------------- pages and slots


@pytest.mark.parametrize('prompt_len, shared, own', [(10, 2, 2), (8, 1, 2), (9, 2, 1), (1, 0, 1)])
def test_samples_share_the_pages_before_the_prompts_last_token(prompt_len, shared, own):
  """Pages of 4 tokens, 4 tokens to generate: what is written is the prompt's last token and what follows it."""
  cluster, _ = prefilled(prompt_len)
  assert cluster.view.pages_needed('a', 'decode0', decodes=True) == shared + 3 * own
  (transfer,) = cluster.start(Transfer('a', 'decode0'))
  assert cluster.free_pages('decode0') == 16 - shared - 3 * own
  assert len(cluster.state.books.holdings['decode0'].slots) == 1
  cluster.end(transfer)
  (step,) = cluster.start(Step('decode0', decodes=ALL))
  arrived = admissions(step)
  assert list(arrived) == [*THREE]
  pages = [arrived[name].pages['kv'] for name in THREE]
  assert len({one[:shared] for one in pages}) == 1
  owned = [page for one in pages for page in one[shared:]]
  assert len(set(owned)) == len(owned) == 3 * own
  assert [arrived[name].tokens for name in THREE] == [(7,), (), ()]
  copies = [arrived[name].copies.get('kv') for name in THREE]
  assert copies == [None, *(((pages[0][shared], one[shared]),) for one in pages[1:])]
  assert [join.context for join in step.joins] == [prompt_len, prompt_len - 1, prompt_len - 1]


def test_the_prompt_is_moved_once_and_all_begin_when_it_is_there():
  cluster, transfers = prefilled(send_to='decode0')
  assert [order.request for order in transfers] == ['a'] and cluster.phase('a#1') is Phase.FOLLOWING
  assert cluster.state.workers['decode0'].decodable() == []
  cluster.end(transfers[0])
  assert cluster.state.workers['decode0'].decodable() == [*THREE]
  assert cluster.free_pages('prefill0') == 16


def test_on_one_worker_the_others_begin_with_the_first_token():
  cluster = Driver(colocated_pool(1, **SIZES))
  cluster.arrive('a', prompt_len=6, n=3)
  (step,) = cluster.start(Step('both0', (Chunk('a', 0, 6),)))
  assert step.chunks[0].slot is not None
  (ahead,) = cluster.start(Step('both0', decodes=ALL))
  assert ahead.batch.requests == ('a',)
  cluster.end(step, {'a': 1})
  cluster.end(ahead, {'a': 1})
  (step,) = cluster.start(Step('both0', decodes=ALL))
  assert step.batch.requests == (*THREE,)
  cluster.end(step, dict.fromkeys(THREE, 1), dict.fromkeys(THREE, 'stop'))
  assert [len(end.tokens) for end in cluster.finished] == [3, 1, 1]
  cluster.assert_idle()


def test_all_have_room_or_none():
  """Two slots are taken, so three samples wait although there are pages and slots for two."""
  cluster, _ = prefilled()
  cluster.arrive('b', prompt_len=4, n=2)
  (step,) = cluster.start(Step('prefill0', (Chunk('b', 0, 4),)))
  cluster.end(step, {'b': 1})
  cluster.start(Transfer('b', 'decode0'))
  room = cluster.view.room()
  assert not room.fits('a', 'decode0', decodes=True) and room.slots('decode0') == 2
  with pytest.raises(PolicyError, match="it needs 8 pages and 3 slots on 'decode0', which has 12 pages and 2 slots"):
    cluster.start(Transfer('a', 'decode0'))


@pytest.mark.parametrize(
  'options, words',
  [
    ({'n': 5}, '5 samples need 5 sequences and 12 pages on one worker that decodes, but these have decode0 4 and 16'),
    ({'n': 4, 'max_tokens': 20}, '10 prompt tokens and up to 20 generated ones of each of 4 samples need 26 pages'),
  ],
)
def test_samples_that_fit_no_worker_are_refused_with_the_numbers(options, words):
  cluster = Driver()
  cluster.arrive('a', prompt_len=10, **options)
  for order in cluster.must():
    cluster.end(order)
  assert [end.request for end in cluster.finished] == [f'a#{i}' if i else 'a' for i in range(options['n'])]
  assert all(end.finish_reason == 'rejected' and words in end.error for end in cluster.finished)
  cluster.assert_idle()


# ---------------------------------------------------------------------------- the first ends before the others begin


@pytest.mark.parametrize('send_to', [None, 'decode0'])
def test_the_first_may_end_with_its_first_token_and_the_others_still_get_the_prompt(send_to):
  cluster, transfers = prefilled(finish='stop', send_to=send_to)
  assert [end.request for end in cluster.finished] == ['a']  # at once
  if send_to is None:
    assert list(cluster.view.prefilled) == ['a#1']
    transfers = cluster.start(Transfer('a#1', 'decode0'))
  assert cluster.phase('a#1') is Phase.MOVING
  cluster.end(transfers[0])
  (step,) = cluster.start(Step('decode0', decodes=ALL))
  arrived = admissions(step)
  assert list(arrived) == ['a#1', 'a#2'] and {one.tokens for one in arrived.values()} == {()}
  moved = set(transfers[0].span.target_pages)
  held = {
    page for one in arrived.values() for page in (*one.pages['kv'], *(pair[0] for pair in one.copies.get('kv', ())))
  }
  assert moved <= held  # nobody else can have been given a page of the prompt
  cluster.end(step, {'a#1': 1, 'a#2': 1}, {'a#1': 'stop', 'a#2': 'stop'})
  cluster.assert_idle()


def test_one_token_each_is_enough_to_move_the_prompt():
  cluster = Driver()
  cluster.arrive('a', prompt_len=8, max_tokens=1, n=2)
  cluster.end(cluster.start(Step('prefill0', (Chunk('a', 0, 8),)))[0], {'a': 1}, {'a': 'length'})
  (transfer,) = cluster.start(Transfer('a#1', 'decode0'))
  cluster.end(transfer)
  cluster.end(cluster.start(Step('decode0', decodes=ALL))[0], {'a#1': 1}, {'a#1': 'length'})
  assert [(end.request, end.finish_reason) for end in cluster.finished] == [('a', 'length'), ('a#1', 'length')]
  cluster.assert_idle()


def test_the_page_to_copy_outlives_the_one_that_wrote_it():
  cluster, (transfer,) = prefilled(send_to='decode0')
  cluster.end(transfer)
  (first,) = cluster.start(Step('decode0', decodes=('a',)))
  cluster.end(first, {'a': 1}, {'a': 'stop'})
  (step,) = cluster.start(Step('decode0', decodes=('a#1',)))
  source = admissions(step)['a#1'].copies['kv'][0][0]
  cluster.arrive('b', prompt_len=4)
  cluster.end(cluster.start(Step('prefill0', (Chunk('b', 0, 4),)))[0], {'b': 1})
  (other,) = cluster.start(Transfer('b', 'decode0'))
  assert source not in other.span.target_pages  # `a#2` still has to copy it
  (step,) = cluster.start(Step('decode0', decodes=('a#2',)))
  assert admissions(step)['a#2'].copies['kv'][0][0] == source


# ---------------------------------------------------------------------------- cancelling and failing


def at_every_point() -> list[tuple[str, object]]:
  def waiting():
    cluster = Driver()
    cluster.arrive('a', prompt_len=10, n=3)
    return cluster, []

  def prefilling():
    cluster, _ = waiting()
    return cluster, list(cluster.start(Step('prefill0', (Chunk('a', 0, 10, 'decode0'),))))

  def moving():
    cluster, _ = prefilled()
    return cluster, list(cluster.start(Transfer('a', 'decode0')))

  def moving_without_the_first():
    return prefilled(finish='length', send_to='decode0')

  def waiting_without_the_first():
    return prefilled(finish='length')

  def decoding():
    cluster, (transfer,) = moving()
    cluster.end(transfer)
    return cluster, [cluster.start(Step('decode0', decodes=ALL))[0] for _ in range(2)]

  def colocated():
    cluster = Driver(colocated_pool(1, **SIZES))
    cluster.arrive('a', prompt_len=6, n=3)
    orders = [*cluster.start(Step('both0', (Chunk('a', 0, 6),))), *cluster.start(Step('both0', decodes=ALL))]
    return cluster, orders

  points = (waiting, prefilling, prefilled, moving, moving_without_the_first, waiting_without_the_first, decoding)
  return [(point.__name__, point) for point in (*points, colocated)]


POINTS = pytest.mark.parametrize('point', [p for _, p in at_every_point()], ids=[n for n, _ in at_every_point()])


@POINTS
def test_withdrawing_the_request_ends_all_samples(point):
  for place in range(len(point()[1]) + 1):
    cluster, orders = point()
    gone = len(cluster.finished)
    cluster.apply(Withdrawn('a'))
    cluster.apply(Withdrawn('a#2'))  # which is ended with it
    ends = cluster.must()
    for order in (*orders[:place], *ends, *orders[place:]):
      end_well(cluster, order)
    assert [end.finish_reason for end in cluster.finished[gone:]] == ['cancelled'] * (3 - gone)
    cluster.assert_idle()


@POINTS
@pytest.mark.parametrize('name', ['a#1', 'a#2'])
def test_withdrawing_a_sample_ends_that_alone(point, name):
  cluster, orders = point()
  cluster.apply(Withdrawn(name))
  (end,) = cluster.must()
  assert end.request == name
  for order in (end, *orders):
    end_well(cluster, order)
  assert [(one.request, one.finish_reason) for one in cluster.finished if one.finish_reason != 'length'] == [
    (name, 'cancelled')
  ]
  assert set(cluster.view.requests) == set(THREE) - {one.request for one in cluster.finished}
  cluster.apply(Withdrawn('a'))
  for order in cluster.must():
    cluster.end(order)
  cluster.assert_idle()


def test_samples_withdrawn_one_by_one_and_then_all_are_told_once():
  cluster, _ = prefilled(finish='stop')
  for name in ('a#1', 'a#2', 'a'):
    cluster.apply(Withdrawn(name))
  for order in cluster.must():
    cluster.end(order)
  assert [end.request for end in cluster.finished] == [*THREE]
  cluster.assert_idle()


@POINTS
def test_a_failed_order_ends_all_samples_that_wait_for_it(point):
  for failed in range(len(point()[1])):
    cluster, orders = point()
    gone = len(cluster.finished)
    for index, order in enumerate(orders):
      if index == failed:
        cluster.apply(Failed(order.id, 1.0, 'boom'))
      else:
        end_well(cluster, order)
    errors = [end for end in cluster.finished[gone:] if end.finish_reason == 'error']
    if isinstance(orders[failed], StepOrder) and not orders[failed].chunks:
      assert {end.request for end in errors} == set(orders[failed].batch.requests)
    else:
      assert len(errors) == 3 - gone
    cluster.apply(Withdrawn('a'))
    for order in cluster.must():
      cluster.end(order)
    cluster.assert_idle()


@POINTS
@pytest.mark.parametrize('lost', ['prefill0', 'decode0', 'both0'])
def test_a_lost_worker_ends_the_samples_that_depend_on_it(point, lost):
  cluster, orders = point()
  if lost not in cluster.state.workers:
    return
  gone = len(cluster.finished)
  depends = any(lost in entry.pages for entry in cluster.view.requests.values())
  cluster.apply(WorkerLost(lost, 1.0, 'gone'))
  assert len(cluster.finished) - gone == (3 - gone if depends else 0)
  for order in orders:
    end_well(cluster, order)
  cluster.apply(Withdrawn('a'))
  for order in cluster.must():
    cluster.end(order)
  cluster.assert_idle()


def test_what_a_policy_may_not_do_with_a_sample():
  cluster, _ = prefilled()
  for action, words in [
    (Step('prefill0', (Chunk('a#1', 0, 4),)), "request 'a#1' is following, so it takes no chunk"),
    (Transfer('a#1', 'decode0'), 'the request is following; only one that is prefilled, or decodes'),
    (Reject('a#1', 'no'), 'the request is following; only a waiting one can be rejected'),
    (Cancel('a#3'), "request 'a#3' is unknown or finished"),
  ]:
    with pytest.raises(PolicyError, match=words):
      cluster.start(action)


def test_the_id_of_a_sample_is_taken():
  cluster = Driver()
  cluster.arrive('a', n=2)
  with pytest.raises(ValueError, match="request 'a#1' is being served already"):
    cluster.arrive('a#1')


# ---------------------------------------------------------------------------- whole runs


class Sampled(Listed):
  """Requests of up to four samples, each of a length of its own; some requests and some samples are withdrawn."""

  def __init__(self, seed: int, withdraws: bool = False):
    self._rng = random.Random(seed)
    requests, now_s = [], 0.0
    for index in range(20):
      now_s += self._rng.expovariate(0.05)
      prompt = tuple(range(2, 2 + self._rng.randint(1, 40)))
      sampling = SamplingParams(max_tokens=self._rng.choice((1, 5, 12)), n=self._rng.randint(1, 4))
      requests.append(Request(f'r{index}', prompt, sampling, now_s))
    self.samples = {sample.id: sample for request in requests for sample in request.samples()}
    lengths = {name: self._rng.randint(1, one.sampling.max_tokens) for name, one in self.samples.items()}
    super().__init__(requests, lengths)
    chosen = self._rng.sample(sorted(self.samples), 12) if withdraws else ()
    times = ((self.samples[name].arrival_s + self._rng.uniform(0, 200), name) for name in chosen)
    self._withdrawals = sorted(times)

  @property
  def closed(self) -> bool:
    return super().closed and not self._withdrawals

  def next_s(self) -> float:
    return min([super().next_s(), *(time_s for time_s, _ in self._withdrawals[:1])])

  def due(self, now_s, finished=()):
    events = super().due(now_s, finished)
    while self._withdrawals and self._withdrawals[0][0] <= now_s:
      events.append(Withdrawn(self._withdrawals.pop(0)[1]))
    return events


class Memory:
  """The tokens in the pages of every worker by the orders, with owner and position. A step happens when it is handed
  over, a transfer is read then and written when it has ended.
  """

  def __init__(self, page_size: int, lengths: dict[str, int]):
    self._page_size = page_size
    self._lengths = lengths
    self._pages: dict[tuple[str, int], dict[int, tuple[str, int]]] = {}
    self._sequences: dict[str, list] = {}  # request, its pages, cached tokens, generated tokens
    self._moving: dict[int, tuple[TransferOrder, list]] = {}
    self._given_up: dict[int, int] = {}
    self._standing: dict[int, StepOrder] = {}
    self.shared = 0

  def follow(self, event: Event) -> None:
    match event:
      case Started(_, StepOrder() as order):
        self._step(order)
      case Started(_, TransferOrder() as order):
        self._moving[order.id] = order, [dict(self._pages.get((order.source, p), {})) for p in order.span.source_pages]
      case Started(_, AbandonOrder(order, transfer)):
        self._given_up[order] = transfer
      case Done(order) if order in self._standing:
        self._decode(self._standing[order], event.num_steps)
      case Done(order) if order in self._given_up:
        self._moving.pop(self._given_up[order], None)
      case Done(order) if order in self._moving:
        moved, contents = self._moving.pop(order)
        self._pages |= {
          (moved.target, page): held for page, held in zip(moved.span.target_pages, contents, strict=True)
        }

  def _step(self, order: StepOrder) -> None:
    for chunk in order.chunks:
      for position in range(chunk.start, chunk.start + chunk.length):
        self._write(order.worker, chunk.pages['kv'], position, owner_of(chunk.request, position))
      if chunk.slot is not None:
        self._sequences[chunk.request.id] = [chunk.request, chunk.pages['kv'], chunk.request.prompt_len, 1]
    for join in order.joins:
      if (new := join.admission) is not None:
        for source, own in new.copies.get('kv', ()):
          self._pages[order.worker, own] = dict(self._pages[order.worker, source])
          self.shared += 1
        cached = new.request.prompt_len + len(new.tokens) - 1
        self._sequences[join.request] = [new.request, new.pages['kv'], cached, len(new.tokens)]
    if order.standing:
      self._standing[order.id] = order
    else:
      self._decode(order, order.steps)

  def _decode(self, order: StepOrder, steps: int) -> None:
    for name in order.batch.requests:
      self._decode_one(order, self._sequences[name], steps)

  def _decode_one(self, order: StepOrder, sequence: list, steps: int) -> None:
    request, pages, _, _ = sequence
    for _ in range(steps):
      if sequence[3] >= self._lengths[request.id]:
        return
      for position in range(sequence[2]):
        held = self._pages[order.worker, pages[position // self._page_size]][position % self._page_size]
        assert held == (owner_of(request, position), position), f'{request.id} reads {held} at {position}'
      position = sequence[2]
      self._write(order.worker, pages, position, owner_of(request, position))
      sequence[2], sequence[3] = sequence[2] + 1, sequence[3] + 1

  def _write(self, worker: str, pages: tuple[int, ...], position: int, owner: str) -> None:
    held = self._pages.setdefault((worker, pages[position // self._page_size]), {})
    held[position % self._page_size] = owner, position


def owner_of(request: Request, position: int) -> str:
  """The owner of a token; those of the prompt are all samples', whichever computed it."""
  return request.sample_of or request.id if position < request.prompt_len else request.id


def check_books(state, memory: Memory) -> None:
  for name, worker in state.workers.items():
    held = {page for entry in state.view.requests.values() for page in entry.pages.get(name, {}).get('kv', ())}
    for entry in state.view.requests.values():
      held |= {source for source, _ in entry.copies.get('kv', ())} if entry.target == name else set()
    for order, _ in memory._moving.values():
      held |= {*(order.span.source_pages if order.source == name else ())}
      held |= {*(order.span.target_pages if order.target == name else ())}
    assert worker.free_pages == worker.num_pages - len(held)


def serve_checked(case: Case, arrivals: Sampled, backend) -> list[Event]:
  state = case.state()
  memory = Memory(case.page_size, {name: arrivals.output_len(name) for name in arrivals.samples})
  events: list[Event] = []
  for event in serve(arrivals, case.policy, backend, state):
    memory.follow(event)
    match event:
      case Failed(order):
        memory._moving.pop(order, None)
      case WorkerLost(lost):
        memory._moving = {
          id: one for id, one in memory._moving.items() if lost not in (one[0].source, one[0].target)
        }  # fmt: skip
      case Turn():
        check_books(state, memory)
    events.append(event)
  assert not state.unfinished and not state.books.samples and not state.books.must
  for name, worker in state.workers.items():
    assert worker.free_pages == worker.num_pages and worker.queued_tokens == 0
    assert sorted(state.books.holdings[name].slots) == list(range(worker.spec.max_sequences))
  assert memory.shared > 5
  return events


CASES = [
  Case(split, page_size, seed, steps)
  for seed, (split, page_size, steps) in enumerate(
    (split, page_size, steps) for split in ('1P1D', '3P2D', '2C') for page_size in (1, 4, 8) for steps in (1, 4)
  )
]
EVERY_CASE = pytest.mark.parametrize('case', CASES, ids=lambda c: f'{c.split}-page{c.page_size}-{c.decode_steps}steps')


@EVERY_CASE
def test_every_sample_reads_its_own_tokens_and_gets_as_many_as_it_should(case):
  arrivals = Sampled(case.seed)
  simulator = case.simulator(arrivals)
  events = serve_checked(case, arrivals, simulator)
  ends = {event.request: event for event in events if isinstance(event, Finished)}
  assert {name: len(end.tokens) for name, end in ends.items()} == {
    name: arrivals.output_len(name) for name in arrivals.samples
  }
  chunks = Counter()
  for _, order in started(events):
    for chunk in getattr(order, 'chunks', ()):
      chunks[chunk.request.id] += chunk.length
  requests = [event.request for event in events if isinstance(event, Arrived)]
  assert chunks == {request.id: request.prompt_len for request in requests}  # each prompt once
  report = Report.from_events(events, workers=case.workers)
  assert report.completed == len(arrivals.samples)
  assert report.total_input_tokens == sum(request.prompt_len for request in requests)
  assert report.account.ttft_closes_s < 1e-9 and report.account.handoff_closes_s < 1e-9
  assert all(one.queue_s >= 0 and one.prefill_s > 0 for one in report.timeline.requests)


@EVERY_CASE
def test_a_replay_of_samples_is_the_whole_log_again(case):
  backend = case.simulator(arrivals := Sampled(case.seed, withdraws=True))
  events = list(serve(arrivals, case.policy, backend, case.state()))
  again = Sampled(case.seed, withdraws=True)
  assert list(serve(again, case.policy, case.recorded(events), case.state())) == events


@pytest.mark.parametrize('seed', range(4))
@EVERY_CASE
def test_withdrawals_and_failures_at_any_time_leave_the_books_balanced(case, seed):
  arrivals = Sampled(100 + seed, withdraws=True)
  backend = Unlucky(TINY, case.workers, HandCost(), seed=seed)
  events = serve_checked(case, arrivals, backend)
  reasons = Counter(event.finish_reason for event in events if isinstance(event, Finished))
  assert reasons.total() == len(arrivals.samples) and set(reasons) <= {'length', 'cancelled', 'error'}


def test_two_prefill_workers_share_a_decode_worker_among_samples():
  cluster = Driver(prefill_pool(2, **SIZES) + decode_pool(1, **SIZES))
  for index, name in enumerate('ab'):
    cluster.arrive(name, prompt_len=6, n=2)
    step, transfer = cluster.start(Step(f'prefill{index}', (Chunk(name, 0, 6, 'decode0'),)))
    cluster.end(step, {name: 1})
    cluster.end(transfer)
  (step,) = cluster.start(Step('decode0', decodes=ALL))
  assert step.batch.requests == ('a', 'a#1', 'b', 'b#1') and len(set(step.batch.slots)) == 4
  names = step.batch.requests
  cluster.end(step, dict.fromkeys(names, 1), dict.fromkeys(names, 'stop'))
  cluster.assert_idle()


@pytest.mark.parametrize('units', [1, 2])
def test_a_prompt_that_is_handed_on_while_it_is_sent_fills_the_pages_of_all_that_follow(units):
  unit_bytes = 4 * TINY.cached_token_bytes('float32')
  spec = TransferSpec(granularity='request', staging_bytes=units * unit_bytes)
  cluster = Driver(transfer=spec)
  cluster.arrive('a', prompt_len=11, n=3)
  step, *transfers = cluster.start(Step('prefill0', (Chunk('a', 0, 11, 'decode0'),)))
  cluster.end(step, {'a': 1}, {'a': 'stop'})  # its first token ends the one that carries the prompt
  filled = set()
  for _ in range(9):
    for transfer in transfers:
      filled |= set(transfer.span.target_pages)
      cluster.end(transfer)
    transfers = cluster.must()
  (step,) = cluster.start(Step('decode0', decodes=ALL))
  arrived = admissions(step)
  assert list(arrived) == ['a#1', 'a#2'] and len(filled) == 3
  for admission in arrived.values():
    copied = {own: source for source, own in admission.copies.get('kv', ())}
    assert {copied.get(page, page) for page in admission.pages['kv'][:3]} == filled
  cluster.end(step, {'a#1': 1, 'a#2': 1}, {'a#1': 'stop', 'a#2': 'stop'})
  cluster.assert_idle()
