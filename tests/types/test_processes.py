"""Where workers' processes run, as data."""

import pytest

from pdjax.types import RayCluster


def test_a_worker_takes_an_accelerator_a_device_as_its_platform_says():
  assert RayCluster().resources(3, 'cpu') == RayCluster().resources(3, None) == {'CPU': 1.0}
  assert RayCluster(cpus=2).resources(4, 'gpu') == {'CPU': 2, 'GPU': 4.0}
  assert RayCluster().resources(1, 'tpu') == {'CPU': 1.0, 'TPU': 1.0}
  assert RayCluster(accelerator='TPU-v5e').resources(2, None) == {'CPU': 1.0, 'TPU-v5e': 2.0}


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
