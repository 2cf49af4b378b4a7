"""Moving pages from one worker's pool to another's."""

from pdjax.kv.transfer.base import Parcel, Transport
from pdjax.kv.transfer.device_put import DevicePut

__all__ = ['DevicePut', 'Parcel', 'Transport']
