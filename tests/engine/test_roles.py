"""Roles that change under load change no token on devices, and nothing is compiled for that once the clock runs."""

import dataclasses
import functools
from collections.abc import Sequence

import pytest

from pdjax.engine.programs import programs_of
from pdjax.policies import Colocated, Disaggregated, FollowLoad
from pdjax.serving import serve
from pdjax.serving.events import RoleChanged, Started
from pdjax.serving.orders import StepOrder
from pdjax.simulator import Replay
from pdjax.types import Role, TransferSpec, WorkerSpec
from pdjax.workload import Listed
from tests.engine.cluster import Cluster, Served
from tests.engine.conftest import SMALL_PIECES, build
from tests.engine.plain import generate
from tests.switching import EITHER, RandomRoles, Swapped, SwitchByLoad, TakeTurns, under_load
from tests.tiny import TINY, TINY_8_2, config

ANY = (Role.PREFILL, Role.DECODE, Role.BOTH)


def changes(served: Served) -> list[RoleChanged]:
  return [event for event in served.events if isinstance(event, RoleChanged)]


def steps(served: Served) -> list[StepOrder]:
  return [one.order for one in served.events if isinstance(one, Started) and isinstance(one.order, StepOrder)]


def assert_exact(cluster: Cluster, served: Served) -> None:
  """Nobody is lost, and each token is that of the plain loop."""
  assert not {one.error for one in served.completions if one.error}
  assert served.tokens() == {request.id: generate(cluster.model, request) for request in served.requests}


@functools.cache
def switching() -> Cluster:
  return build('1P2D', differing=({'may_become': EITHER},) * 3)


def any_roles(transfer: TransferSpec) -> Cluster:
  """Two workers that begin with both roles and may take any."""
  run = config('2C')
  workers = [dataclasses.replace(one, may_become=ANY) for one in run.workers]
  policy = Disaggregated(max_prefill_tokens=24)  # which sends KV, so that there are ways for it
  return Cluster(dataclasses.replace(run, workers=workers, policy=policy, transfer=transfer))


def test_ten_changes_of_roles_under_load_lose_nobody_change_no_token_and_compile_nothing():
  cluster = switching()
  served = cluster.serve(under_load(), TakeTurns())  # which sees that nothing is compiled while its clock runs
  assert_exact(cluster, served)
  assert len(changes(served)) >= 10, changes(served)
  assert {change.worker for change in changes(served)} == {*cluster.workers}
  assert len({(order.source, order.target) for order, _ in served.transfers()}) >= 4
  assert max(change.now_s - change.asked_s for change in changes(served)) > 0, 'nobody had anything to drain'


def test_a_replay_of_such_a_run_finds_every_change_and_every_page_again():
  cluster = switching()
  served = cluster.serve(under_load(80, seed=1), TakeTurns())
  replay = Replay(cluster.model, cluster.specs, served.events)
  state = cluster.empty_state()
  for name, incarnation in served.incarnations.items():
    state.workers[name].incarnation = incarnation
  assert tuple(serve(Listed(served.requests), TakeTurns(), replay, state)) == served.events
  assert changes(served)


@pytest.mark.parametrize(
  'policy',
  [SwitchByLoad(), FollowLoad(Disaggregated(max_prefill_tokens=16), wait_s=1e-6, dwell_s=0.0)],
  ids=lambda one: type(one).__name__,
)
def test_a_policy_that_switches_by_load_changes_no_token(policy):
  cluster = switching()
  served = cluster.serve(under_load(80, seed=2, gap_s=0.0), policy)
  assert_exact(cluster, served)
  assert changes(served)


def test_roles_change_between_meshes_and_page_sizes_that_are_unlike():
  """KV travels to and fro between one device and two, between pages of four tokens and of two."""
  unlike = [{'page_size': 4}, {'page_size': 2, 'num_pages': 96}, {'page_size': 4}]
  cluster = build('1P2D', 1, 2, TINY_8_2, differing=[one | {'may_become': EITHER} for one in unlike])
  served = cluster.serve(under_load(80, seed=6), TakeTurns())
  assert_exact(cluster, served)
  swapped = cluster.serve(under_load(24, seed=8), Swapped('prefill0', 'decode0'))
  assert_exact(cluster, swapped)
  assert changes(served) and len(changes(swapped)) == 2
  ways = {(order.source, order.target) for one in (served, swapped) for order, _ in one.transfers()}
  assert {('prefill0', 'decode0'), ('decode0', 'prefill0')} <= ways


def test_workers_of_any_role_in_groups_of_layers_and_fused_change_no_token():
  """Each program of a worker runs: those of groups of layers, of chunks with decodes, and of decodes alone."""
  layers = TransferSpec(granularity='layers', layer_groups=2, piece_bytes=4096, checksums=True)
  cluster = any_roles(layers)
  served = cluster.serve(under_load(80, seed=3), RandomRoles(Disaggregated(max_prefill_tokens=24)))
  assert_exact(cluster, served)
  assert len(changes(served)) >= 4
  as_they_began = cluster.serve(under_load(12, seed=7), Colocated(token_budget=16))
  assert_exact(cluster, as_they_began)
  ran = [*steps(served), *steps(as_they_began)]
  kinds = {(bool(one.layer_groups), bool(one.chunks), bool(one.decodes)) for one in ran}
  assert {(True, True, False), (False, True, False), (False, False, True)} <= kinds
  assert served.transfers()


def test_colocated_workers_that_take_other_roles_and_come_back_change_no_token():
  cluster = any_roles(SMALL_PIECES)
  served = cluster.serve(under_load(80, seed=4), RandomRoles(Disaggregated(max_prefill_tokens=24, decode_steps=3)))
  assert_exact(cluster, served)
  assert len(changes(served)) >= 4
  assert_exact(cluster, cluster.serve(under_load(12, seed=5), Colocated(token_budget=16)))


@pytest.mark.parametrize('groups', [(), ((0, 1), (1, 2))])
def test_a_worker_has_the_programs_of_every_role_that_it_may_take(groups: Sequence[tuple[int, int]]):
  from pdjax.engine.programs import layer_groups

  def programs(role: Role, *others: Role) -> set[str]:
    spec = WorkerSpec('w', role, num_pages=8, max_sequences=4, may_become=others)
    spec_groups = TransferSpec('auto', 'layers' if groups else 'chunk', layer_groups=2).all_step_groups(spec, 2)
    assert spec_groups == (groups if Role.PREFILL in spec.roles else ())
    return {*programs_of(spec, layer_groups(TINY, spec_groups))}

  for role in Role:
    for other in Role:
      assert programs(role, other) == programs(role) | programs(other)
  assert programs(Role.DECODE, *Role) == {name for role in Role for name in programs(role)}
