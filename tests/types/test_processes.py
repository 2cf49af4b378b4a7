"""The Ray cluster of workers' processes, as data."""

import re

import pytest

from pdjax.types import RayCluster


def test_a_worker_takes_an_accelerator_a_device_as_its_platform_says():
  assert RayCluster().resources(3, 'cpu') == RayCluster().resources(3, None) == {'CPU': 1.0}
  assert RayCluster(cpus=2).resources(4, 'gpu') == {'CPU': 2, 'GPU': 4.0}
  assert RayCluster().resources(1, 'tpu') == {'CPU': 1.0, 'TPU': 1.0}
  assert RayCluster(accelerator='TPU-v5e').resources(2, None) == {'CPU': 1.0, 'TPU-v5e': 2.0}


@pytest.mark.parametrize(
  'platform, accelerator, found, refused',
  [  # by Ray 2.60: findings/ray_gpus_of_an_actor_without.sh
    (
      None,
      None,
      {'CPU': 8.0, 'GPU': 2.0},
      "has 2 GPU, and with platform None .* set platform to 'cpu', 'gpu' or 'tpu'",
    ),
    (None, None, {'CPU': 8.0, 'GPU': 0.5}, 'has 0.5 GPU'),
    (None, None, {'CPU': 8.0, 'TPU': 4.0}, 'has 4 TPU'),
    (None, None, {'GPU': 8.0, 'TPU': 4.0}, 'has 8 GPU and 4 TPU'),
    (None, 'H100', {'GPU': 8.0, 'H100': 8.0}, 'has 8 GPU'),  # a name of one's own hides nothing
    ('gpu', 'H100', {'GPU': 8.0, 'H100': 8.0}, r"leave processes.accelerator \('H100'\) out, or make it 'GPU'"),
    (None, None, {'CPU': 8.0}, None),
    (None, None, {'CPU': 8.0, 'GPU': 0.0}, None),
    (None, 'GPU', {'GPU': 2.0}, None),
    (None, 'TPU', {'TPU': 4.0}, None),
    (None, 'TPU-v5e', {'CPU': 8.0, 'TPU-v5e': 4.0}, None),
    ('cpu', None, {'GPU': 2.0, 'TPU': 4.0}, None),  # JAX is told to look for no others
    ('gpu', None, {'GPU': 2.0}, None),
    ('gpu', 'H100', {'H100': 2.0}, None),
    ('tpu', None, {'TPU': 4.0}, None),
    ('tpu', 'TPU-v5e', {'TPU': 4.0, 'TPU-v5e': 4.0}, None),  # libtpu lets one process have the chips
  ],
)
def test_workers_that_could_take_one_accelerator_twice_are_refused(platform, accelerator, found, refused):
  refusal = RayCluster(accelerator=accelerator).refusal(platform, found)
  if refused is None:
    assert refusal is None
  else:
    assert re.search(refused, refusal)


GPU = {'CPU': 1.0, 'GPU': 1.0}
ONE, TWO = {'a': {'CPU': 1.0}}, {'a': GPU, 'b': GPU}


@pytest.mark.parametrize(
  'strategy, taken, nodes, words',
  [
    ('PACK', ONE, {'n': {'CPU': 1.0}}, None),
    ('PACK', {'a': {'CPU': 0.3}, 'b': {'CPU': 0.3}, 'c': {'CPU': 0.4}}, {'n': {'CPU': 1.0}}, None),
    ('PACK', TWO, {'n': {'CPU': 8.0}}, r"take 2 GPU \(a 1, b 1\), the Ray cluster has none; set platform to 'cpu'"),
    ('PACK', TWO, {'n': {'CPU': 8.0, 'GPU': 1.0}}, r'take 2 GPU \(a 1, b 1\), the Ray cluster has 1;'),
    ('PACK', {'a': {'CPU': 9.0}}, {'n': {'CPU': 8.0}}, r'take 9 CPU \(a 9\), the Ray cluster has 8; lower processes.c'),
    ('PACK', ONE, {}, 'take 1 CPU .*, the Ray cluster has none'),
    (
      'PACK',
      {'a': {'CPU': 1.0, 'H100': 1.0}},
      {'n': {'CPU': 1.0, 'GPU': 1.0}},
      'has none; name in processes.accelerat',
    ),
    ('PACK', TWO, {'m': GPU, 'n': GPU}, None),
    ('SPREAD', TWO, {'n': {'CPU': 2.0, 'GPU': 2.0}}, None),
    (
      'PACK',
      {'a': {'CPU': 1.0, 'GPU': 4.0}},
      {'m': {'CPU': 8.0, 'GPU': 2.0}, 'n': {'CPU': 8.0, 'GPU': 2.0}},
      r"worker 'a' takes 1 CPU and 4 GPU of one node, but no node .* \(m 8 CPU and 2 GPU, n 8 CPU and 2 GPU\)",
    ),
    ('STRICT_PACK', TWO, {'n': {'CPU': 2.0, 'GPU': 2.0}}, None),
    (
      'STRICT_PACK',
      TWO,
      {'m': GPU, 'n': GPU},
      r"with 2 CPU and 2 GPU, but no node .* set processes.strategy to 'PACK'",
    ),
    ('STRICT_SPREAD', TWO, {'m': GPU, 'n': GPU}, None),
    ('STRICT_SPREAD', TWO, {'n': {'CPU': 2.0, 'GPU': 2.0}}, "wants each worker on a node of its own .* to 'SPREAD'"),
    (  # the one that fits anywhere must not take the only place of the other
      'STRICT_SPREAD',
      {'a': {'CPU': 1.0}, 'b': {'CPU': 4.0}},
      {'m': {'CPU': 4.0}, 'n': {'CPU': 2.0}},
      None,
    ),
    (
      'PACK',
      {name: {'CPU': 2.0} for name in 'abc'},
      {'m': {'CPU': 3.0}, 'n': {'CPU': 3.0}},
      r'together they do not fit .* \(m 3 CPU, n 3 CPU\)',
    ),
    ('PACK', {f'w{i}': {'CPU': 2.0} for i in range(16)}, {f'n{i}': {'CPU': 3.0} for i in range(11)}, 'do not fit'),
  ],
)
def test_what_a_cluster_lacks_is_named(strategy, taken, nodes, words):
  accelerator = 'H100' if any('H100' in bundle for bundle in taken.values()) else None
  shortage = RayCluster(strategy=strategy, accelerator=accelerator).shortage(taken, nodes)
  if words is None:
    assert shortage is None
  else:
    assert shortage is not None and re.search(words, shortage), shortage


def test_a_search_for_places_that_takes_too_long_is_left_to_ray():
  taken = {f'w{i}': {'CPU': 3.0 + i / 100} for i in range(30)}
  nodes = {f'n{i}': {'CPU': 5.0 + i / 100} for i in range(29)}
  assert RayCluster().shortage(taken, nodes) is None


def test_by_default_nothing_listens_beyond_this_machine():
  assert RayCluster().host == '127.0.0.1' and RayCluster().address is None


@pytest.mark.parametrize(
  'fields, message',
  [
    ({'host': '0.0.0.0'}, r"host is '0.0.0.0', which no other host can connect to"),
    ({'host': 'everywhere'}, r"host is 'everywhere', expected the IP address .* or 'node'"),
    ({'address': '10.0.0.1'}, "address is '10.0.0.1', expected 'host:port', such as '10.0.0.1:6379', or 'auto'"),
    ({'address': 'head:gcs'}, "address is 'head:gcs', expected 'host:port'"),
    ({'address': 'ray://head:10001'}, "address is 'ray://head:10001', expected 'host:port'"),
    ({'address': 'head:0'}, "address is 'head:0', expected 'host:port'"),
    ({'strategy': 'CLOSE'}, "strategy is 'CLOSE', expected one of 'PACK', 'SPREAD'"),
    ({'cpus': 0}, 'cpus is 0, expected more than 0 cores'),
    ({'start_s': 0}, 'start_s is 0, expected more than 0 seconds'),
    ({'silence_s': 0}, 'silence_s is 0, expected more than 0 seconds'),
  ],
)
def test_what_cannot_be_is_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    RayCluster(**fields)
