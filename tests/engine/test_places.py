"""Cached blocks that travel between places, and sequences that move as they decode: every token is the plain loop's."""

import dataclasses
import functools

import pytest

from pdjax.policies import Colocated, Disaggregated
from pdjax.serving import ClusterView, Transfer, serve
from pdjax.serving.events import RoleChanged
from pdjax.simulator import Replay
from pdjax.types import HostPlace, PrefixCache
from tests.engine.cluster import Cluster, Served
from tests.engine.conftest import SMALL_PIECES
from tests.engine.plain import generate
from tests.engine.test_prefix_cache import SYSTEM, ask, chat, computed, in_turns
from tests.engine.test_roles import assert_exact
from tests.in_turns import InTurns, Settled
from tests.switching import EITHER, TakeTurns, under_load
from tests.tiny import TINY_8_2, config, prompt

CACHE = PrefixCache(block_tokens=4)
HOST = HostPlace('host0', 512 * 1024)
KEPT = Disaggregated(max_prefill_tokens=16, returns_to='host0')


def cluster_of(split: str, policy, places=(HOST,), differing=None, **options) -> Cluster:
  run = config(split, **options)
  workers = run.workers
  if differing is not None:
    workers = [dataclasses.replace(one, **fields) for one, fields in zip(workers, differing, strict=True)]
  fields = {'workers': workers, 'policy': policy, 'places': places, 'prefix_cache': CACHE, 'transfer': SMALL_PIECES}
  return Cluster(dataclasses.replace(run, **fields))


def copies(served: Served) -> dict[tuple[str, str], int]:
  """Tokens that were copied, by source and target."""
  found: dict[tuple[str, str], int] = {}
  for order, _ in served.transfers():
    if order.copy is not None:
      way = order.source, order.target
      found[way] = found.get(way, 0) + order.span.tokens
  return found


@functools.cache
def unequal() -> Cluster:
  """One device and two, pages of 4 and of 8 tokens, few of them where prompts are computed."""
  sizes = [{'page_size': 4, 'num_pages': 16}, {'page_size': 8, 'tp': 2}]
  return cluster_of('1P1D', KEPT, model=TINY_8_2, differing=sizes)


def test_chats_that_were_given_up_where_they_were_computed_come_back_from_the_host():
  cluster = unequal()
  first = chat(cluster, 3)
  others = [
    ask(f'other-{one}', prompt(40, seed=one)) for one in range(3)
  ]  # which take every page of the prefill worker
  said = (*first[-1].prompt, *generate(cluster.model, first[-1])[0])
  requests = in_turns(*first, *others, ask('again', (*said, 3, 4)))
  served = cluster.serve(requests)
  assert_exact(cluster, served)
  whole = (len(said) - 1) // 4 * 4  # what decode made with them
  assert served.by_id['again'].cached_tokens == whole and computed(served)['again'] == len(said) + 2 - whole
  found = copies(served)
  assert found[('host0', 'prefill0')] >= whole and found[('decode0', 'host0')] > 0


def test_a_replay_of_such_a_run_finds_every_copy_again():
  cluster = unequal()
  served = cluster.serve(chat(cluster, 3))
  state = cluster.empty_state()
  for name, incarnation in served.incarnations.items():
    state.books.places[name].incarnation = incarnation
  replay = Replay(cluster.model, (*cluster.specs, *cluster.holders), served.events)
  assert tuple(serve(Settled(served.requests, state), KEPT, replay, state)) == served.events
  assert copies(served)


@pytest.mark.slow
def test_a_colocated_cluster_has_its_host_too():
  cluster = cluster_of('2C', Colocated(token_budget=16, returns_to='host0'))
  requests = [ask(f'r{one}', (*SYSTEM, *prompt(5, seed=one))) for one in range(4)]
  together = [dataclasses.replace(one, id=f'{one.id}-too') for one in requests]
  groups = [*([one] for one in requests), together]
  served = cluster.serve([*requests, *together], arrivals=InTurns(*groups))
  assert_exact(cluster, served)
  assert all(one.cached_tokens >= 32 for name, one in served.by_id.items() if name.endswith('-too'))
  ways = copies(served)
  assert any(target == 'host0' for _, target in ways) and any(source == 'host0' for source, _ in ways)
  assert not {('both0', 'both1'), ('both1', 'both0')} & {way[:2] for way in cluster.transports}


def test_what_decode_made_goes_back_to_the_worker_that_computed_the_prompt():
  policy = Disaggregated(max_prefill_tokens=16, returns_to='source')
  cluster = cluster_of('1P1D', policy, places=())
  requests = chat(cluster, 4)
  served = cluster.serve(requests)
  assert_exact(cluster, served)
  left = [0, *((request.prompt_len + 6 - 1) // 4 * 4 for request in requests[:-1])]
  assert computed(served) == {one.id: one.prompt_len - tokens for one, tokens in zip(requests, left, strict=True)}


@dataclasses.dataclass(frozen=True)
class Restless(Disaggregated):
  """Every sequence that decodes is moved to the other worker whenever it has so many tokens more."""

  every: int = 3
  moves_on: bool = True

  def decide(self, view: ClusterView):
    moves = []
    for worker in view.decode_workers:
      for name, entry in worker.decoding.items():
        if entry.num_tokens - len(entry.delivered) >= self.every and entry.tokens_left > 0:
          moves.append(Transfer(name, next(one.name for one in view.decode_workers if one is not worker)))
    return moves or super().decide(view)


@functools.cache
def restless() -> Cluster:
  """Decode workers of unlike meshes and page sizes, between which sequences move."""
  sizes = [{'page_size': 4}, {'page_size': 4, 'tp': 2}, {'page_size': 8}]
  policy = Restless(max_prefill_tokens=16, decode_steps=2)
  return cluster_of('1P2D', policy, (), sizes, model=TINY_8_2)


@pytest.mark.parametrize('pages_ahead', ['all', 1])
@pytest.mark.parametrize('cache', [None, CACHE], ids=['no cache', 'cache'])
def test_sequences_that_move_while_they_decode_change_no_token(pages_ahead, cache):
  cluster = restless().changed(pages_ahead=pages_ahead, prefix_cache=cache)
  options = {'temperature': 0.9, 'repetition_penalty': 1.3, 'logprobs': 2}
  requests = [ask(f'r{one}', prompt(5 + 3 * one, seed=one), 12, seed=one, ignore_eos=True) for one in range(6)]
  requests += [ask(f's{one}', prompt(5 + 3 * one, seed=one), 9, seed=one, **options) for one in range(4)]
  requests += [ask('n', SYSTEM[:9], 9, temperature=0.8, n=3)]
  served = cluster.serve(requests)
  for request in requests:
    for sample in request.samples():
      assert served.tokens()[sample.id] == generate(cluster.model, sample)
  moved = {(order.source, order.target) for order, _ in served.transfers()}
  assert {('decode0', 'decode1'), ('decode1', 'decode0')} <= moved


@dataclasses.dataclass(frozen=True)
class Turning(TakeTurns):
  """Whose policy moves what decodes on a worker that drains."""

  policy: Disaggregated = Disaggregated(max_prefill_tokens=16, moves_on=True)
  moves_anywhere: bool = True


def test_sequences_of_a_worker_that_drains_are_moved_on_and_no_token_changes():
  cluster = cluster_of('1P2D', Turning(), (), ({'may_become': EITHER},) * 3)
  served = cluster.serve(under_load(120, seed=3))
  assert_exact(cluster, served)
  assert len([event for event in served.events if isinstance(event, RoleChanged)]) >= 4
  decoders = [order for order, _ in served.transfers() if order.source.startswith('decode')]
  assert any(order.target.startswith('decode') for order in decoders)
