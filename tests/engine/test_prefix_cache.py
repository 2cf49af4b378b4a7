"""The prefix cache on devices: what is cached is not computed and not sent again, and no token changes."""

import dataclasses
import functools
import math
import pathlib
import random

import pytest

from experiments.faults.engine_faults import FaultyEngine, FaultyWay, FaultyWorker, fresh
from pdjax.metrics.counters import counters
from pdjax.metrics.timeline import read_timeline
from pdjax.policies import Colocated, Disaggregated, LongestPrefix
from pdjax.serving import serve
from pdjax.serving.events import BlockRemoved, BlockStored, Finished, PrefixHit, Started
from pdjax.serving.orders import StepOrder
from pdjax.serving.page_allocator import PageAllocator
from pdjax.simulator import Simulator
from pdjax.types import FaultSpec, PrefixCache, Request, SamplingParams
from pdjax.workload import TraceWorkload, WorkloadContext
from tests.engine.cluster import Cluster, Served
from tests.engine.conftest import build
from tests.engine.plain import generate
from tests.faults.oracles import assert_blocks
from tests.in_turns import InTurns, Turns
from tests.test_simulator import HandCost
from tests.tiny import TINY, prompt

HITS, QUERIES = 'vllm:prefix_cache_hits_total', 'vllm:prefix_cache_queries_total'


def cached(cluster: Cluster, block_tokens: int = 4) -> Cluster:
  """The same workers, which keep what they have computed."""
  return cluster.changed(prefix_cache=PrefixCache(block_tokens=block_tokens))


def in_turns(*requests: Request) -> Turns:
  """Requests that come one after another."""
  return Turns(requests)


def ask(name: str, tokens, max_tokens: int = 6, seed: int = 7, **options) -> Request:
  sampling = {key: options.pop(key) for key in (*options,) if key in SamplingParams.__dataclass_fields__}
  return Request(name, tuple(tokens), SamplingParams(max_tokens=max_tokens, seed=seed, **sampling), **options)


def computed(served: Served) -> dict[str, int]:
  """Prompt tokens that were computed, by request."""
  found: dict[str, int] = {}
  for event in served.events:
    if isinstance(event, Started) and isinstance(event.order, StepOrder):
      for chunk in event.order.chunks:
        found[chunk.request.id] = found.get(chunk.request.id, 0) + chunk.length
  return found


def moved(served: Served) -> dict[str, int]:
  """Tokens that were sent, those that fill pages up too, by request."""
  found: dict[str, int] = {}
  for order, _ in served.transfers():
    found[order.request] = found.get(order.request, 0) + order.span.tokens
  return found


def found(served: Served, side: str) -> dict[str, int]:
  """Tokens that were found on one side, by request."""
  return {hit.request: hit.tokens for hit in served.events if isinstance(hit, PrefixHit) and hit.side == side}


def assert_exact(cluster: Cluster, requests, policy=None) -> Served:
  served = cluster.serve(requests, policy)
  assert served.tokens() == {request.id: generate(cluster.model, request) for request in requests}
  hits = {name: one.cached_tokens for name, one in served.by_id.items()}
  assert computed(served) == {request.id: request.prompt_len - hits[request.id] for request in requests}
  assert found(served, 'prefill') == {name: tokens for name, tokens in hits.items() if tokens}
  assert served.report.cached_tokens == sum(hits.values()) == counters(read_timeline(served.events))[HITS]
  assert counters(read_timeline(served.events))[QUERIES] == sum(request.prompt_len for request in requests)
  return served


SYSTEM = prompt(32, seed=1)


def chat(cluster: Cluster, turns: int, **sampling) -> list[Request]:
  """Turns of a chat, each of which begins with all that was said before."""
  said = SYSTEM[:11]
  requests = []
  for turn in range(turns):
    request = ask(f'turn-{turn}', said, **sampling)
    requests.append(request)
    said = (*said, *generate(cluster.model, request)[0], *prompt(5, seed=turn))
  return in_turns(*requests)


def test_a_prompt_that_begins_like_another_is_computed_and_sent_from_there_on(one_and_one):
  requests = in_turns(
    ask('first', (*SYSTEM, 3, 4, 5)), ask('second', (*SYSTEM, 9, 8, 7, 6, 5)), ask('shorter', (*SYSTEM[:18], 1)),
    ask('other', prompt(20, seed=2)), ask('same', (*SYSTEM, 3, 4, 5)),
  )  # fmt: skip
  served = assert_exact(cached(one_and_one), requests)
  assert '80 of 146 input tokens were cached' in str(served.report)
  assert computed(served) == {'first': 35, 'second': 5, 'shorter': 3, 'other': 20, 'same': 3}
  assert moved(served) == {'first': 36, 'second': 8, 'shorter': 4, 'other': 20, 'same': 4}
  assert found(served, 'decode') == {'second': 32, 'shorter': 16, 'same': 32}
  assert served.report.prefix_hits == {'prefill': {'prefill0': 80}, 'decode': {'decode0': 80}}


def test_a_prompt_of_whole_blocks_that_is_all_cached_has_its_last_block_computed_and_nothing_sent(one_and_one):
  requests = in_turns(ask('first', SYSTEM), ask('again', SYSTEM), ask('one token', SYSTEM, max_tokens=1))
  served = assert_exact(cached(one_and_one), requests)
  assert computed(served) == {'first': 32, 'again': 4, 'one token': 4}
  assert moved(served) == {'first': 32}


@pytest.mark.parametrize('sampling', [{}, {'temperature': 0.9, 'repetition_penalty': 1.3, 'logprobs': 3}], ids=str)
def test_a_chat_is_exact_and_decode_is_sent_what_it_has_not_made_itself(one_and_one, sampling):
  requests = chat(one_and_one, 4, **sampling)
  served = assert_exact(cached(one_and_one), requests)
  tokens, sent = computed(served), moved(served)
  lengths = [request.prompt_len for request in requests]  # 11, 22, 33, 44: six tokens are generated, five are added
  assert lengths == [11, 22, 33, 44]
  whole = [0, *(length // 4 * 4 for length in lengths[:-1])]  # the prefill worker has only prompts
  assert tokens == {f'turn-{turn}': lengths[turn] - whole[turn] for turn in range(4)}
  left = [0, *((length + 6 - 1) // 4 * 4 for length in lengths[:-1])]  # and the decode worker its own tokens too
  assert sent == {f'turn-{turn}': -(-lengths[turn] // 4) * 4 - left[turn] for turn in range(4)}


@pytest.mark.parametrize('block_tokens', [4, 16])
def test_colocated_chats_are_exact(colocated, block_tokens):
  requests = chat(colocated, 4)
  served = assert_exact(cached(colocated, block_tokens), requests)
  left = [0, *((length + 6 - 1) // block_tokens * block_tokens for length in (11, 22, 33))]  # pages are of 16 tokens
  assert computed(served) == {f'turn-{turn}': 11 * (turn + 1) - left[turn] for turn in range(4)}


@functools.cache
def unequal(tps: tuple[int, int] = (2, 1), page_sizes: tuple[int, int] = (16, 4)) -> Cluster:
  """One worker of each kind, of so many devices and with pages of so many tokens."""
  sizes = [{'tp': tp, 'page_size': size} for tp, size in zip(tps, page_sizes, strict=True)]
  return build('1P1D', differing=sizes)


@pytest.mark.parametrize(
  'tps, page_sizes', [((2, 1), (16, 4)), pytest.param((1, 2), (4, 16), marks=pytest.mark.slow)], ids=str
)
def test_unequal_meshes_and_page_sizes_are_exact(tps, page_sizes):
  cluster = cached(unequal(tps, page_sizes))
  requests = chat(cluster, 4)
  served = assert_exact(cluster, requests)
  _, theirs = page_sizes
  assert computed(served)['turn-3'] == 44 - 32  # in blocks of 4, with part of a page of 16
  assert moved(served)['turn-3'] == 44 - 38 // theirs * theirs


@pytest.mark.parametrize('policy', [Disaggregated(max_prefill_tokens=16), Disaggregated(place_prefill=LongestPrefix())])
def test_branches_on_two_and_two_are_exact_and_nothing_is_computed_twice_where_it_is(two_and_two, policy):
  rng = random.Random(5)
  requests = [
    ask(f'r{number}', (*SYSTEM[: rng.randrange(4, 33)], *prompt(rng.randrange(1, 9), seed=number)))
    for number in range(24)
  ]
  requests = [dataclasses.replace(one, arrival_s=0.03 * number) for number, one in enumerate(requests)]
  served = assert_exact(cached(two_and_two), requests, policy)
  tokens = computed(served)
  assert sum(tokens.values()) < sum(request.prompt_len for request in requests)
  assert all(0 < tokens[request.id] <= request.prompt_len for request in requests)


def test_samples_of_a_prompt_count_a_hit_once(one_and_one, colocated):
  for cluster in (one_and_one, colocated):
    requests = in_turns(ask('first', (*SYSTEM, 1, 2)), ask('second', (*SYSTEM, 5), temperature=1.1))
    several = dataclasses.replace(requests[1], sampling=SamplingParams(6, 1.1, seed=7, n=2))
    served = cached(cluster).serve(in_turns(requests[0], several))
    alone = [generate(cluster.model, sample) for sample in several.samples()]
    assert [served.tokens()[sample.id] for sample in several.samples()] == alone
    assert computed(served) == {'first': 34, 'second': 1}
    assert [served.by_id[sample.id].cached_tokens for sample in several.samples()] == [32, 0]


def test_who_asks_not_to_be_cached_leaves_nothing_and_finds_nothing(one_and_one):
  requests = in_turns(
    ask('private', SYSTEM, cache_prefix=False), ask('first', SYSTEM), ask('private again', SYSTEM, cache_prefix=False)
  )
  assert computed(assert_exact(cached(one_and_one), requests)) == {'private': 32, 'first': 32, 'private again': 32}


def test_tenants_share_nothing_unless_their_salt_is_one(one_and_one):
  requests = in_turns(
    ask('ann', SYSTEM, tenant='ann'), ask('bob', SYSTEM, tenant='bob'), ask('nobody', SYSTEM),
    ask('cat', SYSTEM, tenant='cat', cache_salt='ann'), ask('ann again', SYSTEM, tenant='ann'),
  )  # fmt: skip
  served = assert_exact(cached(one_and_one), requests)
  assert computed(served) == {'ann': 32, 'bob': 32, 'nobody': 32, 'cat': 4, 'ann again': 4}


def test_few_pages_are_given_to_whoever_needs_them_and_no_token_changes(colocated):
  """Of 40 prompts of 4 families more pages are left behind than there are."""
  requests = [
    ask(f'r{number}', (*prompt(24, seed=number % 4), *prompt(6, seed=100 + number)), arrival_s=0.02 * number)
    for number in range(40)
  ]
  served = assert_exact(cached(colocated), requests, Colocated(token_budget=32))
  place = served.state.books.holdings['both0'].pages.by_kind['kv']
  assert 0 < place.num_cached <= place.num_pages == place.num_free
  assert served.state.books.prefixes.index.num_blocks('both0') <= place.num_pages * 4


def test_blocks_are_told_with_their_tokens_where_these_are_asked_for(one_and_one):
  cluster = one_and_one.changed(prefix_cache=PrefixCache(block_tokens=4, log_tokens=True))
  served = cluster.serve([ask('a', SYSTEM[:9], max_tokens=5)])
  told = [event for event in served.events if isinstance(event, BlockStored)]
  said = (*SYSTEM[:9], *served.by_id['a'].token_ids)
  assert [(one.medium, one.token_ids) for one in told] == [
    ('prefill0', said[:8]), ('decode0', said[:8]), ('decode0', said[8:12]),
  ]  # fmt: skip
  assert told[2].parent == told[1].keys[16:] and told[0].keys == told[1].keys
  private = cached(one_and_one).serve([ask('a', SYSTEM[:9], max_tokens=5)])
  assert [one.token_ids for one in private.events if isinstance(one, BlockStored)] == [(), (), ()]


def families(count: int, gap_s: float = 0.02) -> list[Request]:
  """Prompts of three families that part within a page or a block, of one or two samples."""
  rng = random.Random(11)
  return [
    Request(
      f'r{number}', (*prompt(rng.randrange(17, 33), seed=number % 3), *prompt(rng.randrange(1, 9), seed=100 + number)),
      SamplingParams(max_tokens=rng.choice((2, 9, 14)), seed=number, n=rng.choice((1, 2)), ignore_eos=True),
      arrival_s=gap_s * number,
    )
    for number in range(count)
  ]  # fmt: skip


@pytest.mark.parametrize('ahead', ['all', 0])
@pytest.mark.parametrize('split', ['1P1D', '1C'])
def test_nan_in_free_pages_reaches_no_token_where_pages_are_hit_in_part_copied_and_grow(
  one_and_one, colocated, split, ahead
):
  """So few pages that some are forgotten, and where they are taken as sequences grow some sequences begin again."""
  cluster = (colocated if split == '1C' else one_and_one).changed(
    prefix_cache=PrefixCache(block_tokens=4), pages_ahead=ahead
  )
  pages = 12 if split == '1C' else 44
  cluster.specs = tuple(dataclasses.replace(one, num_pages=pages) for one in cluster.specs)
  requests = families(16)
  policy = Colocated(token_budget=32) if split == '1C' else Disaggregated(max_prefill_tokens=32)
  served = cluster.serve(requests, policy)
  assert served.tokens() == {
    sample.id: generate(cluster.model, sample) for request in requests for sample in request.samples()
  }
  orders = [event.order for event in served.events if isinstance(event, Started)]
  steps = [order for order in orders if isinstance(order, StepOrder)]
  assert served.report.cached_tokens > 60
  assert any(isinstance(event, BlockRemoved) for event in served.events)
  assert any(join.admission is not None and join.admission.copies for step in steps for join in step.joins)
  assert any(chunk.copies for step in steps for chunk in step.chunks) == (split == '1C')  # blocks are pages elsewhere
  assert any(step.growth for step in steps) == (ahead == 0)


def test_nan_in_pages_that_are_hit_would_be_seen(one_and_one, monkeypatch):
  """What the tests above would say of a page that is free when it is needed."""
  monkeypatch.setattr(PageAllocator, 'is_cached', lambda place, page: False)
  monkeypatch.setattr('tests.engine.cluster.check', lambda books: None)
  served = cached(one_and_one).serve(in_turns(ask('first', SYSTEM), ask('second', (*SYSTEM, 3))))
  assert served.by_id['first'].error is None and 'not finite' in served.by_id['second'].error


def test_a_trace_hits_on_devices_what_it_hits_in_the_simulator(one_and_one, colocated):
  """Of the made-up chats those that fit, whose tokens follow their ids; in the simulator ids alone count."""
  path = pathlib.Path(__file__).parents[1] / 'data' / 'traces' / 'bailian_made_up.jsonl'
  arrivals = TraceWorkload(path=path).arrivals(WorkloadContext(TINY.vocab_size, TINY.context_len, None))
  asked = [event.request for event in arrivals.due(math.inf) if event.request.prompt_len < 60]
  lens = {one.id: min(arrivals.output_len(one.id), 10) for one in asked}
  for cluster, policy in ((one_and_one, Disaggregated(max_prefill_tokens=32)), (colocated, Colocated(token_budget=32))):
    hits = []
    on_devices = cached(cluster).serve((), policy, arrivals=InTurns(*[[one] for one in asked], output_lens=lens))
    trusting = cluster.changed(prefix_cache=PrefixCache(block_tokens=4, trusts_block_hashes=True))
    simulated = serve(
      InTurns(*[[one] for one in asked], output_lens=lens), policy, Simulator(TINY, cluster.specs, HandCost()),
      trusting.empty_state(),
    )  # fmt: skip
    for events in (on_devices.events, simulated):
      ends = [event for event in events if isinstance(event, Finished)]
      assert {end.request: len(end.tokens) for end in ends} == lens
      hits.append({end.request: end.cached_tokens for end in ends})
    assert hits[0] == hits[1] and sorted(hits[0].values()) == [0, 0, 32, 48]


def test_ids_of_blocks_say_nothing_where_tokens_are_computed(one_and_one):
  """Two prompts that a simulation would take for alike."""
  hashed = {'block_hashes': (7, 8), 'block_size': 8}
  requests = in_turns(ask('first', SYSTEM[:16], **hashed), ask('second', prompt(16, seed=9), **hashed))
  assert computed(assert_exact(cached(one_and_one), requests)) == {'first': 16, 'second': 16}


# ---------------------------------------------------------------------------- faults between a hit and its use


class Once:
  """An engine where one thing goes wrong, the first time that it can, with a request.

  That is a chunk of it, the last chunk, a decode step or a transfer.

  Attributes:
    acted: Those orders that went wrong.
  """

  def __init__(self, engine, cluster: Cluster, where: str, fault: str, request: str):
    self.acted: list = []
    self._engine, self._workers = FaultyEngine(engine), cluster.workers
    self._engine.fault_of = self._fault_of
    self._where, self._fault, self._request = where, fault, request
    self._told: list = []
    for worker in self._workers.values():
      int(worker.slots.rows.tokens[0])  # what a fault asks for, compiled by now

  def submit(self, orders) -> None:
    lost = [order.worker for order in orders if self._is_meant(order) and not self.acted and self._goes_wrong(order)]
    self._engine.submit(orders)
    for worker in lost:
      self._told += self._engine.lose(worker)

  def wait(self, until_s: float):
    now_s, events = self._engine.wait(0.0 if self._told else until_s)
    told, self._told = self._told, []
    return now_s, [*events, *told]

  def _is_meant(self, order) -> bool:
    if not isinstance(order, StepOrder):
      return False
    chunks = [one.request.id for one in order.chunks if one.is_last or self._where == 'chunk']
    return self._request in {'decode': order.batch.requests, 'transfer': ()}.get(self._where, chunks)

  def _goes_wrong(self, order) -> bool:
    """Note it; whether its worker is lost."""
    self.acted.append(order)
    if self._fault != 'lost':
      self._workers[order.worker].faults[order.id] = self._fault
    return self._fault == 'lost'

  def _fault_of(self, order):
    if self._where != 'transfer' or order.request != self._request or self.acted:
      return None
    self.acted.append(order)
    return self._fault


STEP_FAULTS = ('refused', 'refused halfway', 'fails', 'takes its pages', 'lost')
CASES = [(where, fault) for where in ('chunk', 'decode') for fault in STEP_FAULTS]
CASES += [('chunk', 'early NaN'), ('last chunk', 'NaN'), ('decode', 'NaN')]
CASES += [('transfer', fault) for fault in ('refused', 'fails', 'stalls', 'corrupts', 'permutes')]


QUICK = [
  ('chunk', 'takes its pages'), ('chunk', 'lost'), ('chunk', 'early NaN'), ('decode', 'fails'), ('decode', 'lost'),
  ('transfer', 'fails'), ('transfer', 'stalls'), ('transfer', 'corrupts'),
]  # fmt: skip


@pytest.mark.parametrize(
  ('split', 'where', 'fault'),
  [
    pytest.param(split, *case, marks=[] if case in QUICK else [pytest.mark.slow])
    for split in ('1P1D', '1C')
    for case in CASES
    if split != '1C' or case[0] != 'transfer'
  ],
)
def test_whatever_fails_of_who_was_hit_or_of_who_left_it_nobody_has_another_token(colocated, split, where, fault):
  """A request leaves blocks; one is hit, beside another that holds them, and something fails; then others are hit.

  And the same once more, where it fails for the one that leaves the blocks.
  """
  cluster = colocated if split == '1C' else unequal()
  cluster = cached(cluster).changed(
    prefix_cache=PrefixCache(block_tokens=4), faults=FaultSpec(corruption='retry', backoff_s=0.0),
    transfer=dataclasses.replace(cluster.transfer, deadline_s=0.2, checksums=True),
  )  # fmt: skip
  cluster.transports = {way: FaultyWay(one) for way, one in cluster.transports.items()}
  policy = Colocated(token_budget=16) if split == '1C' else Disaggregated(max_prefill_tokens=16)
  groups = [
    [ask('first', (*SYSTEM, 5, 6))],
    [ask('hit', (*SYSTEM[:27], *prompt(19, seed=3)), max_tokens=7), ask('beside', (*SYSTEM, 9), max_tokens=5)],
    [ask('last', (*SYSTEM[:27], *prompt(19, seed=3), 4)), ask('again', (*SYSTEM, 5, 6, 7))],
  ]
  asked = {request.id: request for group in groups for request in group}
  for worker in cluster.workers.values():
    FaultyWorker.of(worker)
  for victim in ('hit', 'first'):
    once: list[Once] = []

    def wrap(engine, victim=victim, once=once) -> Once:
      once.append(Once(engine, cluster, where, fault, victim))
      return once[0]

    with fresh(cluster.transports.values(), cluster.workers.values()):
      served = cluster.serve((), policy, arrivals=InTurns(*groups), wrap=wrap)
    assert len(once[0].acted) == 1
    right = {name: generate(cluster.model, request) for name, request in asked.items()}
    wrong = {name for name, got in served.tokens().items() if got != right[name]}
    if 'NaN' in fault:  # what was computed with such weights is an error, of whoever was in that step, and nobody's hit
      assert wrong and wrong <= ({'first'} if victim == 'first' else {'hit', 'beside'})
      assert {served.by_id[name].finish_reason for name in wrong} == {'error'}
      continue
    assert not wrong, {name: served.by_id[name].error for name in wrong}
    hits = {name: one.cached_tokens for name, one in served.by_id.items()}
    assert hits['first'] == 0 and min(hits['last'], hits['again']) > 0
    assert victim == 'first' or min(hits['hit'], hits['beside']) > 0
    assert_blocks(served.events, served.state)
  after = cluster.serve(groups[0], policy)  # nothing is left in workers that others share
  assert after.tokens() == {'first': generate(cluster.model, asked['first'])}


@pytest.mark.parametrize('split', ['1P1D', '1C'])
def test_who_goes_on_from_a_chunk_with_nan_computes_it_anew(colocated, split):
  """The request of that chunk ends with it, though it was not its last, so that nobody finds what it has left."""
  cluster = cached(colocated if split == '1C' else unequal())
  for worker in cluster.workers.values():
    FaultyWorker.of(worker)
  cluster.transports = {way: FaultyWay(one) for way, one in cluster.transports.items()}
  policy = Colocated(token_budget=16) if split == '1C' else Disaggregated(max_prefill_tokens=16)
  begin = prompt(32, seed=5)
  requests = [ask('first', (*begin, *prompt(8, seed=6)), n=2), ask('behind', (*begin, *prompt(6, seed=7)))]
  once: list[Once] = []

  def wrap(engine) -> Once:
    once.append(Once(engine, cluster, 'chunk', 'early NaN', 'first'))
    return once[0]

  with fresh(cluster.transports.values(), cluster.workers.values()):
    served = cluster.serve(requests, policy, wrap=wrap)
  assert len(once[0].acted) == 1
  assert {name for name, one in served.by_id.items() if one.finish_reason == 'error'} == {'first', 'first#1'}
  assert computed(served)['first'] <= 32 and served.tokens()['behind'] == generate(cluster.model, requests[1])
