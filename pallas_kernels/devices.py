"""Facts of the devices that kernels are compiled for. A new device is a new row here, not new code."""

import dataclasses
import re
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Tpu:
  """Facts of a TPU."""

  cores: int  # that share a grid's parallel dimension
  vmem_bytes: int  # vector memory of a core, as far as a kernel may ask for it
  smem_bytes: int  # scalar memory of a core
  matrix_width: int  # rows and columns of a matrix unit
  topology: str  # for which to compile without such a device
  clock_hz: float


@dataclasses.dataclass(frozen=True)
class Gpu:
  """Facts of a GPU of NVIDIA."""

  compute_capability: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Device:
  """One device as JAX lists it: a whole chip, or one of the two of a tpu7x."""

  name: str  # as tuning tables say it
  platform: str  # 'tpu', 'gpu' or 'cpu'
  chip: Tpu | Gpu | None = None  # what only its platform has; None if nothing is known of it
  bf16_flops: float = 0.0  # at the peak, per second; of a GPU without bfloat16, float16's
  hbm_bytes: int = 0
  hbm_bandwidth: float = 0.0  # bytes per second

  @property
  def tpu(self) -> Tpu:
    """The facts of a TPU; nobody asks another device for them."""
    assert isinstance(self.chip, Tpu), f'{self.name} is no TPU'
    return self.chip

  @property
  def gpu(self) -> Gpu | None:
    """The facts of a GPU of NVIDIA, or None."""
    return self.chip if isinstance(self.chip, Gpu) else None


LANES = 128  # of a TPU's vector registers: the last axis of an array fills them
_MIB, _GIB = 1 << 20, 1 << 30


def _tpu(
  name: str,
  cores: int,
  vmem: int,
  matrix_width: int,
  topology: str,
  clock_hz: float,
  flops: float,
  gib: int,
  rate: float,
) -> Device:
  return Device(name, 'tpu', Tpu(cores, vmem, _MIB, matrix_width, topology, clock_hz), flops, gib * _GIB, rate)


def _gpu(name: str, compute_capability: tuple[int, int], flops: float, gib: int, rate: float) -> Device:
  return Device(name, 'gpu', Gpu(compute_capability), flops, gib * _GIB, rate)


TPUS = {
  'TPU v4': _tpu('v4', 2, 16 * _MIB, 128, 'v4:2x2x1', 1.05e9, 275e12, 32, 1228e9),
  'TPU v5 lite': _tpu('v5e', 1, 128 * _MIB, 128, 'v5e:2x2', 1.5e9, 197e12, 16, 819e9),
  'TPU v5': _tpu('v5p', 2, 64 * _MIB, 128, 'v5p:2x2x1', 1.75e9, 459e12, 95, 2765e9),
  'TPU v6 lite': _tpu('v6e', 1, 128 * _MIB, 256, 'v6e:2x2', 1.75e9, 918e12, 32, 1640e9),
  'TPU7x': _tpu('tpu7x', 1, 64 * _MIB, 256, 'tpu7x:2x2x1', 2.2e9, 1153.5e12, 96, 3690e9),
}  # by device kind
GPUS = {
  'Tesla T4': _gpu('t4', (7, 5), 65e12, 16, 320e9),
  'NVIDIA A100-SXM4-40GB': _gpu('a100-40', (8, 0), 312e12, 40, 1555e9),
  'NVIDIA A100-SXM4-80GB': _gpu('a100', (8, 0), 312e12, 80, 2039e9),
  'NVIDIA L4': _gpu('l4', (8, 9), 121e12, 24, 300e9),
  'NVIDIA H100 80GB HBM3': _gpu('h100', (9, 0), 989e12, 80, 3350e9),
  'NVIDIA H200': _gpu('h200', (9, 0), 989e12, 141, 4800e9),
  'NVIDIA B200': _gpu('b200', (10, 0), 2250e12, 180, 8000e9),
}  # by device kind; dense peaks as NVIDIA's data sheets give them
_KINDS = TPUS | GPUS
_OTHER_KINDS = {'TPU v5e': 'TPU v5 lite', 'TPU v5p': 'TPU v5', 'TPU v6e': 'TPU v6 lite'}  # as some versions say it


def by_name(name: str) -> Device:
  """The device of a short name such as 'v6e' or 'h100'.

  Raises:
    ValueError: if there is none.
  """
  for device in _KINDS.values():
    if device.name == name:
      return device
  raise ValueError(f'device {name!r} is unknown; there are {", ".join(device.name for device in _KINDS.values())}.')


def current() -> Device:
  """The device that is being compiled for: of the mesh in context, else JAX's default device."""
  device = jax.sharding.get_abstract_mesh().abstract_device or getattr(jax.config, 'jax_default_device', None)
  if device is None or isinstance(device, str):  # a platform's name
    device = jax.devices(device)[0]
  return of(device)


def of(device: Any) -> Device:
  """The facts of a `jax.Device`, or of the abstract one of a mesh."""
  kind = _OTHER_KINDS.get(device.device_kind, device.device_kind)
  if known := _KINDS.get(kind):
    if isinstance(known.chip, Tpu):  # as many cores as this process sees in one
      cores = getattr(device, 'num_cores', None) or known.chip.cores
      return dataclasses.replace(known, chip=dataclasses.replace(known.chip, cores=cores))
    return known
  if not hasattr(device, 'platform'):  # an abstract one knows its kind alone
    device = next((one for one in jax.devices() if one.device_kind == device.device_kind), device)
  platform = getattr(device, 'platform', kind)
  if platform not in ('gpu', 'cuda', 'rocm'):
    return Device(kind, platform)
  # ROCm's devices have names there, such as gfx90a.
  found = re.fullmatch(r'(\d+)\.(\d+)', str(getattr(device, 'compute_capability', '')))
  return Device(kind, 'gpu', None if found is None else Gpu((int(found[1]), int(found[2]))))
