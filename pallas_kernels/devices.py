"""What the kernels know of the devices they are compiled for. A new device is a new row here, not new code."""

import dataclasses
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Device:
  """One device as JAX lists it: a whole chip, or one of the two of a tpu7x."""

  name: str  # as tuning tables say it
  platform: str  # 'tpu', 'gpu' or 'cpu'
  cores: int = 1  # that share a grid's parallel dimension
  vmem_bytes: int = 0  # vector memory of a core, as far as a kernel may ask for it
  smem_bytes: int = 0  # scalar memory of a core
  matrix_width: int = 0  # rows and columns of a matrix unit
  topology: str = ''  # for which to compile without such a device
  clock_hz: float = 0.0
  bf16_flops: float = 0.0  # at the peak, per second
  hbm_bytes: int = 0
  hbm_bandwidth: float = 0.0  # bytes per second


LANES = 128  # of a TPU's vector registers: the last axis of an array fills them
_MIB, _GIB = 1 << 20, 1 << 30

TPUS = {
  'TPU v4': Device('v4', 'tpu', 2, 16 * _MIB, _MIB, 128, 'v4:2x2x1', 1.05e9, 275e12, 32 * _GIB, 1228e9),
  'TPU v5 lite': Device('v5e', 'tpu', 1, 128 * _MIB, _MIB, 128, 'v5e:2x2', 1.5e9, 197e12, 16 * _GIB, 819e9),
  'TPU v5': Device('v5p', 'tpu', 2, 64 * _MIB, _MIB, 128, 'v5p:2x2x1', 1.75e9, 459e12, 95 * _GIB, 2765e9),
  'TPU v6 lite': Device('v6e', 'tpu', 1, 128 * _MIB, _MIB, 256, 'v6e:2x2', 1.75e9, 918e12, 32 * _GIB, 1640e9),
  'TPU7x': Device('tpu7x', 'tpu', 1, 64 * _MIB, _MIB, 256, 'tpu7x:2x2x1', 2.2e9, 1153.5e12, 96 * _GIB, 3690e9),
}  # by device kind
_OTHER_KINDS = {'TPU v5e': 'TPU v5 lite', 'TPU v5p': 'TPU v5', 'TPU v6e': 'TPU v6 lite'}  # as some versions say it


def by_name(name: str) -> Device:
  """The TPU of a short name such as 'v6e'.

  Raises:
    ValueError: if there is none.
  """
  for device in TPUS.values():
    if device.name == name:
      return device
  raise ValueError(f'device {name!r} is unknown; there are {", ".join(device.name for device in TPUS.values())}.')


def current() -> Device:
  """The device that is being compiled for: of the mesh in context, else JAX's default device."""
  device = jax.sharding.get_abstract_mesh().abstract_device or getattr(jax.config, 'jax_default_device', None)
  if device is None or isinstance(device, str):  # a platform's name
    device = jax.devices(device)[0]
  return of(device)


def of(device: Any) -> Device:
  """What is known of a `jax.Device`, or of the abstract one of a mesh."""
  kind = _OTHER_KINDS.get(device.device_kind, device.device_kind)
  platform = getattr(device, 'platform', None) or kind
  if kind in TPUS:
    return dataclasses.replace(TPUS[kind], cores=getattr(device, 'num_cores', None) or TPUS[kind].cores)
  return Device(kind, 'gpu' if platform in ('gpu', 'cuda', 'rocm') else platform)
