"""Where workers' processes run, as data."""

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


def test_by_default_nothing_listens_beyond_this_machine():
  assert RayCluster().host == '127.0.0.1' and RayCluster().address is None


@pytest.mark.parametrize(
  'fields, message',
  [
    ({'host': '0.0.0.0'}, r"host is '0.0.0.0', which no other host can connect to"),
    ({'host': 'everywhere'}, r"host is 'everywhere', expected the IP address .* or 'node'"),
    ({'strategy': 'CLOSE'}, "strategy is 'CLOSE', expected one of PACK, SPREAD"),
    ({'cpus': 0}, 'cpus is 0, expected more than 0 cores'),
    ({'silence_s': 0}, 'silence_s is 0, expected more than 0 seconds'),
  ],
)
def test_what_cannot_be_is_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    RayCluster(**fields)
