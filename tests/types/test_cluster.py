"""Worker specs, splits, buckets and the carving of devices."""

import dataclasses

import pytest

from pdjax.types import Role, TransferSpec, WorkerSpec, colocated_pool, decode_pool, parse_split, prefill_pool
from pdjax.types.cluster import by_platform, carve_devices, carve_needed, devices_needed, ways
from pdjax.types.worker import bucket_for, buckets


@pytest.mark.parametrize('field', ['tp', 'max_sequences', 'max_step_tokens', 'max_chunks', 'max_fused_steps'])
@pytest.mark.parametrize('size', [0, -3])
def test_a_worker_refuses_sizes_below_one(field, size):
  with pytest.raises(ValueError, match=f"worker 'w' has {field}={size}, expected at least 1"):
    WorkerSpec('w', **{field: size})


@pytest.mark.parametrize('num_pages', [0, -1, 'many', 1.5])
def test_a_worker_refuses_pages_that_are_no_count(num_pages):
  with pytest.raises(ValueError, match=f"num_pages={num_pages!r}, expected a positive count or 'auto'"):
    WorkerSpec('w', num_pages=num_pages)


def test_a_worker_refuses_a_layout_that_is_unknown():
  with pytest.raises(ValueError, match="'w' has page_layout='packed', expected one of 'auto', 'plain', 'paired', 'kv'"):
    WorkerSpec('w', page_layout='packed')


@pytest.mark.parametrize('devices', [(), (0,), (0, 0), (0, 1, 2)])
def test_a_worker_refuses_devices_that_are_not_tp_distinct_ones(devices):
  with pytest.raises(ValueError, match='expected 2 distinct ones because tp=2'):
    WorkerSpec('w', tp=2, devices=devices)


def test_devices_may_be_given_as_a_list():
  worker = WorkerSpec('w', tp=2, devices=[3, 1])
  assert worker.devices == (3, 1) and hash(worker)


def test_a_role_may_be_given_as_text():
  worker = WorkerSpec('w', 'decode')
  assert worker.role is Role.DECODE and worker.role.decodes and not worker.role.prefills
  with pytest.raises(ValueError, match='translate'):
    WorkerSpec('w', 'translate')


def test_a_worker_names_all_its_roles_once_and_the_first_first():
  worker = WorkerSpec('w', 'prefill', may_become=['decode', Role.PREFILL, 'decode'])
  assert worker.roles == (Role.PREFILL, Role.DECODE) and worker.phases == 'prefill (may become decode)'
  assert WorkerSpec('w', 'decode').roles == (Role.DECODE,) and WorkerSpec('w', 'decode').phases == 'decode'


@pytest.mark.parametrize(
  'role, may_become, prefills, decodes',
  [
    ('prefill', (), True, False), ('decode', (), False, True), ('both', (), True, True),
    ('prefill', ('decode',), True, True), ('decode', ('both',), True, True), ('decode', ('decode',), False, True),
  ],
)  # fmt: skip
def test_what_a_worker_ever_does_follows_from_all_its_roles(role, may_become, prefills, decodes):
  worker = WorkerSpec('w', role, may_become=may_become)
  assert (worker.ever_prefills, worker.ever_decodes) == (prefills, decodes)


def test_there_is_a_way_between_workers_in_any_of_their_roles():
  workers = prefill_pool(1, may_become=('decode',)) + prefill_pool(2)[1:] + decode_pool(1)
  assert [(source.name, target.name) for source, target in ways(workers)] == [
    ('prefill0', 'decode0'),
    ('prefill1', 'prefill0'),
    ('prefill1', 'decode0'),
  ]


def test_steps_run_in_groups_of_layers_where_any_role_of_a_worker_has_some():
  spec = TransferSpec(granularity='layers', layer_groups=2)
  groups = {role: spec.all_step_groups(WorkerSpec('w', role), 4) for role in Role}
  assert groups == {Role.PREFILL: ((0, 2), (2, 4)), Role.DECODE: (), Role.BOTH: (), Role.HOLD: ()}
  assert spec.all_step_groups(WorkerSpec('w', 'decode', may_become=('both', 'prefill')), 4) == ((0, 2), (2, 4))
  assert TransferSpec(granularity='chunk').all_step_groups(WorkerSpec('w', 'prefill'), 4) == ()


def test_both_roles_are_filled_by_a_colocated_worker_alone_and_none_by_a_place_that_holds():
  roles = [(role.prefills, role.decodes) for role in Role]
  assert roles == [(True, False), (False, True), (True, True), (False, False)]


def test_pools_number_their_workers_after_the_role():
  workers = prefill_pool(2, tp=3) + decode_pool(1, max_sequences=5) + colocated_pool(1)
  assert [(worker.name, worker.role.value, worker.tp) for worker in workers] == [
    ('prefill0', 'prefill', 3),
    ('prefill1', 'prefill', 3),
    ('decode0', 'decode', 1),
    ('both0', 'both', 1),
  ]
  assert workers[2].max_sequences == 5
  assert prefill_pool(0) == ()


def test_a_transfer_refuses_batches_of_no_page():
  with pytest.raises(ValueError, match='piece_bytes is 0, expected at least 1'):
    TransferSpec(piece_bytes=0)
  with pytest.raises(ValueError, match="granularity is 'token', expected one of 'auto', 'request', 'chunk', 'layers'"):
    TransferSpec(granularity='token')


@pytest.mark.parametrize('num_layers, layer_groups', [(1, 4), (2, 4), (4, 4), (30, 4), (7, 3), (5, 1)])
def test_groups_of_layers_are_as_many_as_asked_for_and_differ_by_one_at_most(num_layers, layer_groups):
  groups = TransferSpec(layer_groups=layer_groups).groups(num_layers)
  assert [layer for first, stop in groups for layer in range(first, stop)] == list(range(num_layers))
  lengths = [stop - first for first, stop in groups]
  assert len(groups) == min(num_layers, layer_groups) and max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize('num_layers, count', [(1, 1), (2, 2), (7, 7), (16, 4), (30, 5), (31, 4), (32, 4), (80, 4)])
def test_groups_of_layers_are_of_one_length_where_that_can_be(num_layers, count):
  assert len(TransferSpec().groups(num_layers)) == count


@pytest.mark.parametrize(
  'split, counts', [('2P1D', (2, 1)), (' 1p3d ', (1, 3)), ('10P20D', (10, 20)), ('02P1D', (2, 1))]
)
def test_a_split_is_read_as_two_counts(split, counts):
  assert parse_split(split) == counts


@pytest.mark.parametrize('split', ['', '2P', '1D', '0P1D', '1P0D', '00P1D', '1D2P', '1P1D1C', 'P1D', '-1P1D'])
def test_a_split_that_is_none_is_refused(split):
  with pytest.raises(ValueError, match='2P1D'):
    parse_split(split)


@pytest.mark.parametrize(
  'largest, smallest, factor, expected',
  [(8, 1, 2, (1, 2, 4, 8)), (10, 2, 4, (2, 8, 10)), (5, 5, 2, (5,)), (3, 32, 4, (3,)), (1, 1, 2, (1,))],
)
def test_buckets_rise_up_to_the_largest(largest, smallest, factor, expected):
  assert buckets(largest, smallest, factor) == expected


def test_a_size_goes_into_the_smallest_bucket_that_holds_it():
  assert [bucket_for(size, (2, 8, 10)) for size in (1, 2, 3, 8, 9, 10)] == [2, 2, 8, 8, 10, 10]
  with pytest.raises(ValueError, match='11 does not fit the largest bucket, 10'):
    bucket_for(11, (2, 8, 10))


def test_the_largest_step_of_a_worker_has_a_bucket():
  worker = WorkerSpec('w', max_step_tokens=500, max_sequences=7)
  for sizes, largest in ((worker.token_buckets, 500), (worker.batch_buckets, 7)):
    assert sizes[-1] == largest and list(sizes) == sorted(set(sizes))


@pytest.mark.parametrize(
  ('most', 'sizes'),
  [(1, (1,)), (2, (1, 2)), (8, (1, 8)), (9, (1, 8, 9)), (32, (1, 8, 16, 32)), (100, (1, 8, 16, 32, 64, 100))],
)
def test_no_decode_step_of_more_than_eight_is_padded_to_twice_its_size(most, sizes):
  assert WorkerSpec('w', max_sequences=most).batch_buckets == sizes


def test_workers_get_devices_of_their_own_in_order():
  workers = prefill_pool(2, tp=2) + decode_pool(1, tp=3)
  assert carve_devices(workers, 8) == {'prefill0': (0, 1), 'prefill1': (2, 3), 'decode0': (4, 5, 6)}
  assert devices_needed(workers) == 7


def test_unnamed_workers_get_devices_that_nobody_names():
  workers = (WorkerSpec('a', tp=2), WorkerSpec('b', devices=(1,)), WorkerSpec('c'))
  assert carve_devices(workers, 4) == {'a': (0, 2), 'b': (1,), 'c': (3,)}


def test_workers_that_name_the_same_devices_share_them():
  workers = prefill_pool(1, devices=(0,)) + decode_pool(1, devices=(0,))
  assert devices_needed(workers) == 1
  assert carve_devices(workers, 1) == {'prefill0': (0,), 'decode0': (0,)}


@pytest.mark.parametrize(
  'workers, there_are, needed',
  [
    (prefill_pool(1, tp=4) + decode_pool(1, tp=5), 8, 9),
    ((WorkerSpec('w', devices=(5,)),), 5, 6),
    ((WorkerSpec('v', devices=(0,)), *decode_pool(2)), 2, 3),
  ],
)
def test_too_few_devices_are_refused_with_both_counts_and_the_remedies(workers, there_are, needed):
  with pytest.raises(ValueError, match=f'need {needed} devices .* there are {there_are}; lower tp') as error:
    carve_devices(workers, there_are)
  assert workers[0].name in str(error.value) and 'virtual devices' in str(error.value)
  assert len(carve_devices(workers, needed)) == len(workers)


def test_workers_are_values():
  worker = WorkerSpec('w')
  assert worker == WorkerSpec('w') and hash(worker) == hash(WorkerSpec('w'))
  with pytest.raises(dataclasses.FrozenInstanceError):
    worker.tp = 2


def test_devices_of_unlike_platforms_are_never_the_same():
  workers = (
    WorkerSpec('a', tp=2, platform='cpu'),
    WorkerSpec('b', devices=(0,), platform='gpu'),
    WorkerSpec('c', platform='cpu'),
    WorkerSpec('d', devices=(0,)),
  )
  assert carve_needed(workers) == {'a': (0, 1), 'b': (3,), 'c': (2,), 'd': (4,)}
  assert workers[1].named_devices == (('gpu', 0),) and workers[3].named_devices == ((None, 0),)
  assert {platform: [one.name for one in group] for platform, group in by_platform(workers).items()} == {
    'cpu': ['a', 'c'],
    'gpu': ['b'],
    None: ['d'],
  }
