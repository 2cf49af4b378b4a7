"""Moving pages from one worker's pool to another's."""

from collections.abc import Callable

from pdjax.kv.transfer.base import PagePool, Parcel, Transport
from pdjax.kv.transfer.checksums import CorruptError
from pdjax.kv.transfer.cross_process import CrossProcess
from pdjax.kv.transfer.device_put import DevicePut
from pdjax.kv.transfer.host_staged import HostStaged
from pdjax.types.transfer import TransferSpec

TRANSPORTS: dict[str, Callable[[PagePool, PagePool, TransferSpec], Transport]] = {
  'device_put': DevicePut,
  'host_staged': HostStaged,
  'cross_process': CrossProcess,
}
"""By the names of `TransferSpec.transport`."""

__all__ = ['TRANSPORTS', 'CorruptError', 'CrossProcess', 'DevicePut', 'HostStaged', 'Parcel', 'Transport']
