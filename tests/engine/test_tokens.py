"""The same tokens whatever serves them: every topology, mesh and page size against a plain loop."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import pytest

from pdjax.kv.transfer import TRANSPORTS
from pdjax.model.plain import PlainLoop
from pdjax.model.weights import load_weights
from pdjax.policies import Colocated, Disaggregated
from pdjax.sharding import make_mesh
from pdjax.types import Request, SamplingParams
from tests.engine.cluster import Cluster, live_pages
from tests.engine.conftest import SMALL_PIECES, build
from tests.engine.plain import EXACT, Cached, generate
from tests.tiny import TINY, TINY_8_2, TINY_12_12, prompt

# of one token; shorter than a page; exactly a page of 4 and of 16; several chunks; all of the context but a few
LENGTHS = (1, 3, 4, 16, 17, 40, 59)
SAMPLED = ({}, {'temperature': 0.8}, {'temperature': 1.5, 'top_k': 9}, {'temperature': 1.2, 'top_p': 0.7},
           {'temperature': 1.0, 'top_k': 30, 'top_p': 0.9})  # fmt: skip


def mixed_requests(max_tokens: int = 6, lengths=LENGTHS) -> list[Request]:
  """Every length greedily and sampled; greedy and sampled requests meet in one batch."""
  options = itertools.cycle(SAMPLED)
  return [
    Request(
      f'{kind}-{length}',
      prompt(length, seed=length),
      SamplingParams(max_tokens=max_tokens, seed=2**33 + length, **(next(options) if kind == 'sampled' else {})),
    )
    for length in lengths
    for kind in ('greedy', 'sampled')
  ]


def assert_exact(cluster: Cluster, requests, policy=None, caches=EXACT):
  served = cluster.serve(requests, policy)
  assert not {one.error for one in served.completions if one.error}
  assert served.tokens() == {request.id: generate(cluster.model, request, caches) for request in requests}
  return served


def assert_live_pages_moved(cluster: Cluster, served):
  """Each request's tokens moved once, and no more than fill the pages of its prompt, the smaller ones of both sides."""
  unit = math.gcd(*(spec.page_size for spec in cluster.specs))
  num_layers = cluster.model.num_layers
  moved = {request.id: 0 for request in served.requests}  # tokens of one layer
  for order, _ in served.transfers():
    first, stop = order.span.bounds(num_layers)
    moved[order.request] += (stop - first) * order.span.tokens
  assert moved == {request.id: num_layers * unit * live_pages(request, unit) for request in served.requests}


def test_two_prefill_and_two_decode_workers_are_exact(two_and_two):
  served = assert_exact(two_and_two, mixed_requests())
  assert_live_pages_moved(two_and_two, served)
  assert {span.worker for span in served.report.timeline.spans} == set(two_and_two.workers)  # all took part
  assert len({(order.source, order.target) for order, _ in served.transfers()}) > 1


def test_one_prefill_and_one_decode_worker_are_exact(one_and_one):
  assert_live_pages_moved(one_and_one, assert_exact(one_and_one, mixed_requests()))


def test_two_colocated_workers_are_exact(colocated_pair):
  served = assert_exact(colocated_pair, mixed_requests())
  assert served.report.num_transfers == 0
  assert {span.worker for span in served.report.timeline.spans} == {'both0', 'both1'}
  assert 'fused' in {span.kind for span in served.report.timeline.spans}


def test_one_colocated_worker_is_exact(colocated):
  assert_exact(colocated, mixed_requests())


@pytest.mark.parametrize('steps', [3, 8])
def test_decode_steps_fused_on_the_device_change_no_token(one_and_one, colocated, steps):
  requests = mixed_requests(max_tokens=11, lengths=(1, 4, 17, 40))
  served = assert_exact(one_and_one, requests, Disaggregated(max_prefill_tokens=16, decode_steps=steps))
  longest = max(len(result.tokens) for event in served.events for result in getattr(event, 'results', ()))
  assert longest == steps
  assert_exact(colocated, requests, Colocated(token_budget=16, decode_steps=steps))


@pytest.mark.parametrize('budget', [1, 7, 32])
def test_the_size_of_the_chunks_changes_no_token(one_and_one, colocated, budget):
  requests = mixed_requests(max_tokens=3, lengths=(4, 17, 21))
  assert_exact(one_and_one, requests, Disaggregated(max_prefill_tokens=budget))
  assert_exact(colocated, requests, Colocated(token_budget=budget + 6))


def test_requests_that_join_while_others_run_are_exact(two_and_two, colocated):
  requests = [dataclasses.replace(one, arrival_s=0.004 * i) for i, one in enumerate(mixed_requests(max_tokens=12))]
  assert_exact(two_and_two, requests)
  assert_exact(colocated, requests)


def test_prompts_that_wait_for_a_place_to_decode_are_moved_later_and_exact(two_and_two):
  part = two_and_two.only('prefill0', 'prefill1', 'decode0')
  requests = mixed_requests(max_tokens=16, lengths=(3, 4, 5, 6, 7, 8))  # twelve requests for four slots
  served = assert_exact(part, requests)
  whole = [order for order, _ in served.transfers() if order.after is None]
  assert whole, 'no request had to wait for a slot'
  assert_live_pages_moved(part, served)


# ---------------------------------------------------------------------------- meshes and page sizes

MESHES = [  # model, prefill tp, decode tp, page size, granularity and transport; greedily in check_transfers
  (TINY, 2, 1, 1, 'layers', 'device_put'),
  pytest.param(TINY_8_2, 2, 4, 4, 'request', 'host_staged', marks=pytest.mark.slow),
]


@pytest.mark.parametrize(
  'model, prefill_tp, decode_tp, page_size, granularity, transport', MESHES, ids=lambda x: getattr(x, 'name', None)
)
def test_unequal_meshes_are_exact(model, prefill_tp, decode_tp, page_size, granularity, transport):
  transfer = dataclasses.replace(SMALL_PIECES, transport=transport, granularity=granularity)
  sizes = {'max_sequences': 2, 'num_pages': 256 // page_size}
  cluster = build('1P1D', prefill_tp, decode_tp, model, page_size, transfer=transfer, **sizes)
  assert {type(way) for way in cluster.transports.values()} == {TRANSPORTS[transport]}
  served = assert_exact(cluster, mixed_requests(max_tokens=5, lengths=(1, 3, 4, 16, 40)))
  assert_live_pages_moved(cluster, served)
  assert served.report.notes == ()
  by_layers = {order.span.layers is not None for order, _ in served.transfers()}
  assert by_layers <= {granularity == 'layers'} | {False}  # those that wait for a slot travel whole
  assert (True in by_layers) == (granularity == 'layers')


LAYOUTS = [  # model, prefill tp, decode tp, and the page layouts of both
  pytest.param(TINY, 1, 1, 'kv', 'plain', marks=pytest.mark.slow),
  (TINY_12_12, 2, 3, 'paired', 'kv'),
]


@pytest.mark.parametrize('model, prefill_tp, decode_tp, ours, theirs', LAYOUTS, ids=lambda x: getattr(x, 'name', None))
def test_workers_of_unlike_page_layouts_are_exact(model, prefill_tp, decode_tp, ours, theirs):
  cluster = build(
    '1P1D', prefill_tp, decode_tp, model, max_sequences=2, differing=[{'page_layout': ours}, {'page_layout': theirs}]
  )
  assert [worker.pages.layout.name for worker in cluster.workers.values()] == [ours, theirs]
  served = assert_exact(cluster, mixed_requests(max_tokens=5, lengths=(1, 3, 4, 16, 40)))
  assert_live_pages_moved(cluster, served)


POOLS = [  # model, prefill tp, decode tp, and dtype and tokens a page of both
  (TINY, 1, 1, ('int8', 'int8'), (16, 1)),
  pytest.param(TINY_12_12, 3, 2, ('float32', 'float32'), (6, 4), marks=pytest.mark.slow),
  (TINY_12_12, 1, 3, ('float32', 'int8'), (4, 16)),
  (TINY, 2, 1, ('int8', 'float32'), (16, 4)),
  (TINY_8_2, 1, 4, ('bfloat16', 'float16'), (1, 4)),
]


@pytest.mark.parametrize('model, prefill_tp, decode_tp, caches, sizes', POOLS, ids=lambda x: getattr(x, 'name', None))
def test_workers_of_unlike_pools_give_what_a_loop_with_the_same_conversions_does(
  model, prefill_tp, decode_tp, caches, sizes
):
  differing = [
    {'kv_dtype': dtype, 'page_size': size, 'num_pages': 384 // size} for dtype, size in zip(caches, sizes, strict=True)
  ]
  cluster = build('1P1D', prefill_tp, decode_tp, model, max_sequences=2, differing=differing)
  pools = [(worker.pages.dtype.name, worker.pages.page_size) for worker in cluster.workers.values()]
  assert pools == list(zip(caches, sizes, strict=True))
  served = assert_exact(cluster, mixed_requests(max_tokens=5, lengths=(1, 3, 4, 16, 17, 40)), caches=caches)
  assert_live_pages_moved(cluster, served)


@pytest.mark.parametrize('weights', [('bfloat16', 'float32'), ('float16', 'float32'), ('float32', 'bfloat16')])
def test_workers_of_unlike_weights_give_what_a_loop_that_prefills_with_one_and_decodes_with_the_other_does(weights):
  devices = (0,) if weights[0] == 'float32' else None  # both on one device there, each with its copy
  differing = [{'weights': name, 'devices': devices} for name in weights]
  cluster = build('1P1D', page_size=4, max_sequences=2, differing=differing)
  dtypes = {name: jnp.dtype(name) for name in weights}
  for worker, name in zip(cluster.workers.values(), weights, strict=True):
    assert {leaf.dtype for leaf in jax.tree.leaves(worker.weights)} == {dtypes[name]}
    assert worker.pages.dtype == jnp.float32
  mesh = make_mesh(TINY, jax.devices()[:1])
  copies = load_weights(Cached(TINY), TINY, dict.fromkeys(weights, mesh), dtypes)
  loop = PlainLoop(TINY, copies[weights[0]], 64, 16, copies[weights[1]], jnp.dtype('float32'))
  requests = mixed_requests(max_tokens=9, lengths=(1, 3, 4, 16, 17, 40))
  greedy = [request for request in requests if request.id.startswith('greedy')]
  served = cluster.serve(greedy)
  expected = {request.id: tuple(loop.generate(request.prompt, 9)) for request in greedy}
  tokens = {name: tokens for name, (tokens, _) in served.tokens().items()}
  assert len(greedy) == 6 and {name: one[0] for name, one in tokens.items()} == {
    name: one[0] for name, one in expected.items()
  }
  near_ties = 0 if weights[1] == 'float32' else 1  # in 16 bits the order of a sum may decide between two tokens
  assert sum(tokens[name] != expected[name] for name in expected) <= near_ties
  same = PlainLoop(TINY, copies[weights[0]], 64, 16)
  if 'bfloat16' in weights:  # float16 is so near to float32 that no token of these differs
    assert any(tuple(same.generate(request.prompt, 9)) != expected[request.id] for request in greedy)


def test_no_token_changes_with_room_on_the_way_for_little_at_once(one_and_one):
  unit_bytes = 4 * one_and_one.model.cached_token_bytes('float32')
  narrow = one_and_one.only('prefill0', 'decode0')
  narrow.transfer = dataclasses.replace(narrow.transfer, staging_bytes=2 * unit_bytes)
  served = assert_exact(narrow, mixed_requests())
  assert_live_pages_moved(narrow, served)
  assert all(order.span.tokens == 4 for order, _ in served.transfers())


def test_a_colocated_worker_with_int8_pages_loses_what_a_loop_with_them_does():
  cluster = build('1C', page_size=4, max_sequences=2, differing=[{'kv_dtype': 'int8'}])
  assert_exact(cluster, mixed_requests(max_tokens=5, lengths=(1, 3, 16, 40)), caches=('int8', 'int8'))


# ---------------------------------------------------------------------------- ends


def test_a_stop_token_of_the_request_ends_it(one_and_one, colocated):
  for cluster, steps in ((one_and_one, 1), (one_and_one, 8), (colocated, 1), (colocated, 8)):
    whole = Request('whole', prompt(9, seed=4), SamplingParams(max_tokens=10))
    tokens, _ = generate(TINY, whole)
    stop = tokens[4]
    stopped = Request('stopped', whole.prompt, SamplingParams(max_tokens=10, stop_token_ids=(95, stop)))
    policy = dataclasses.replace(cluster.config.policy, decode_steps=steps)
    served = assert_exact(cluster, [whole, stopped], policy)
    assert served.by_id['stopped'].token_ids == tokens[: tokens.index(stop) + 1]
    assert served.by_id['stopped'].finish_reason == 'stop'
    assert served.by_id['whole'].finish_reason == 'length'


def test_a_chat_ends_with_what_its_template_puts_behind_an_answer_unless_ends_are_ignored(one_and_one):
  free = Request('free', prompt(9, seed=4), SamplingParams(max_tokens=10, ignore_eos=True))
  tokens = generate(TINY, free)[0]
  at = next(place for place in range(2, 10) if tokens[place] not in tokens[:place])
  chat = dataclasses.replace(free, id='chat', sampling=SamplingParams(max_tokens=10), end_token_ids=(tokens[at],))
  ignoring = dataclasses.replace(free, id='ignoring', end_token_ids=(tokens[at],))
  served = one_and_one.serve([chat, ignoring]).tokens()
  assert served == {'chat': (tokens[: at + 1], 'stop'), 'ignoring': (tokens, 'length')}


def test_a_stop_token_that_comes_first_ends_the_request_before_anything_moves(one_and_one):
  free = Request('free', prompt(9, seed=4), SamplingParams(max_tokens=10))
  first = generate(TINY, free)[0][0]
  stopped = dataclasses.replace(free, id='stopped', sampling=SamplingParams(max_tokens=10, stop_token_ids=(first,)))
  served = assert_exact(one_and_one, [stopped])
  assert served.by_id['stopped'].token_ids == (first,)


def test_the_models_own_end_is_heeded_unless_it_is_to_be_ignored(one_and_one, colocated):
  eos = TINY.eos_token_ids[0]

  def request(seed: int, ignore_eos: bool) -> Request:
    sampling = SamplingParams(max_tokens=12, temperature=2.0, seed=seed, ignore_eos=ignore_eos)
    return Request(f'{seed}-{ignore_eos}', prompt(5), sampling)

  seed = next(seed for seed in range(1000) if eos in generate(TINY, request(seed, True))[0][1:-1])
  for cluster in (one_and_one, colocated):
    served = assert_exact(cluster, [request(seed, False), request(seed, True)])
    stopped, ignored = served.completions
    assert stopped.finish_reason == 'stop' and stopped.token_ids[-1] == eos and len(stopped.token_ids) < 12
    assert ignored.finish_reason == 'length' and len(ignored.token_ids) == 12
    assert ignored.token_ids[: len(stopped.token_ids)] == stopped.token_ids


def test_one_token_ends_where_the_prompt_was_computed_and_nothing_moves(one_and_one):
  requests = [Request(f'r{n}', prompt(n, seed=n), SamplingParams(max_tokens=1)) for n in (1, 4, 30)]
  served = assert_exact(one_and_one, requests)
  assert served.report.num_transfers == 0 and served.report.wire_bytes == 0
  assert [len(one.token_ids) for one in served.completions] == [1, 1, 1]


@pytest.mark.parametrize('length, expected', [(64, 1), (63, 2), (61, 4)])
def test_a_prompt_near_the_context_gets_what_is_left_of_it(one_and_one, colocated, length, expected):
  request = Request('long', prompt(length), SamplingParams(max_tokens=20, ignore_eos=True))
  for cluster in (one_and_one, colocated):
    served = assert_exact(cluster, [request])
    assert len(served.completions[0].token_ids) == expected
    assert served.completions[0].finish_reason == 'length'


def test_a_seed_gives_the_same_tokens_in_any_company(one_and_one, colocated):
  mine = Request('mine', prompt(7), SamplingParams(max_tokens=10, temperature=1.0, seed=2**40 + 1, ignore_eos=True))
  alone = one_and_one.serve([mine]).by_id['mine'].token_ids
  crowd = mixed_requests(max_tokens=8)
  assert colocated.serve([*crowd, mine]).by_id['mine'].token_ids == alone
  other = dataclasses.replace(mine, id='other', sampling=dataclasses.replace(mine.sampling, seed=1))
  assert one_and_one.serve([*crowd, mine, other]).by_id['mine'].token_ids == alone
  assert generate(TINY, other)[0] != alone
