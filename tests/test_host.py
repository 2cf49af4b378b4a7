"""An address is this host's, or is refused."""

import pytest

from pdjax.host import check_own, own_addresses
from pdjax.types.cluster import DeviceError


def test_an_address_of_another_host_is_refused_with_those_of_this_one():
  check_own('127.0.0.1')
  with pytest.raises(DeviceError, match=r"processes.host is '192\.0\.2\.7', where nothing can listen .*127\.0\.0\.1"):
    check_own('192.0.2.7')
  assert '127.0.0.1' in own_addresses()
