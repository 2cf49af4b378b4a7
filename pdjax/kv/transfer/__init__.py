"""Moving pages from one worker's pool to another's."""

from pdjax.kv.transfer.base import Parcel, Transport
from pdjax.kv.transfer.checksums import CorruptError
from pdjax.kv.transfer.device_put import DevicePut
from pdjax.kv.transfer.host_staged import HostStaged

TRANSPORTS = {'device_put': DevicePut, 'host_staged': HostStaged}  # as `TransferSpec.transport` names them

__all__ = ['TRANSPORTS', 'CorruptError', 'DevicePut', 'HostStaged', 'Parcel', 'Transport']
