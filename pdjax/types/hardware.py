"""Kinds of devices, and the rates of chips and links with the sources of the figures."""

import dataclasses
import math
import re
from typing import Annotated, Any, ClassVar, Literal

from pdjax.types.checked import Rate, Seconds, Share, check_fields
from pdjax.types.fitting import Must, at_least

DtypeName = Literal['float32', 'bfloat16', 'float16']
_Amount = Annotated[float, Must(lambda value: 0 <= value < math.inf, '0 or more')]
DTYPE_BYTES: dict[DtypeName, int] = {'float32': 4, 'bfloat16': 2, 'float16': 2}


def precision_of(dtype: DtypeName | None) -> str:
  """Precision of matrix products of a dtype, as `jax.default_matmul_precision` takes it: full in float32."""
  return 'highest' if dtype == 'float32' else 'default'


_TPU = (
  'docs.cloud.google.com/tpu/docs; dense peak, one chip; ICI: both links of a ring, one way, and about 1 us a hop, '
  'jax-ml/scaling-book tpus.md and sharding.md'
)
_GPU = (
  'jax-ml/scaling-book gpus.md; dense peak, SXM; NVLink one way; 0.6 us a hop, as NVIDIA/nccl src/graph/tuning.cc has '
  'for a ring over NVLink (LL)'
)
_TPU_HOP_S, _NVLINK_HOP_S = 1e-6, 0.6e-6


@dataclasses.dataclass(frozen=True, slots=True)
class DeviceKind:
  """The kind of a device, as far as it decides which dtypes it is fast in.

  Attributes:
    name: Its name by its maker, such as 'Tesla T4'.
    platform: 'cpu', 'gpu' or 'tpu'.
    compute_capability: Of a CUDA GPU, such as '7.5'. Other GPUs have other names there, such as 'gfx90a', and other
      devices none.
  """

  name: str
  platform: str
  compute_capability: str | None = None

  @classmethod
  def of(cls, device: Any) -> 'DeviceKind':
    """The kind of a JAX device."""
    return cls(device.device_kind, device.platform, getattr(device, 'compute_capability', None))

  @property
  def lacks_bfloat16(self) -> bool:
    """Whether it is a GPU without units for bfloat16: of a CUDA compute capability below 8.0."""
    found = re.fullmatch(r'(\d+)\.\d+', self.compute_capability or '')
    return self.platform == 'gpu' and found is not None and int(found[1]) < 8

  @property
  def fastest_dtype(self) -> DtypeName:
    """The dtype that `dtype='auto'` takes: bfloat16, or float16 on a GPU that lacks it; on a CPU float32."""
    if self.platform == 'cpu':
      return 'float32'
    return 'float16' if self.lacks_bfloat16 else 'bfloat16'

  def __str__(self) -> str:
    capability = '' if self.compute_capability is None else f' (compute capability {self.compute_capability})'
    return f'{self.name}{capability}'


@dataclasses.dataclass(frozen=True, slots=True)
class ChipSpec:
  """Peak rates of one device and how much of them is reached.

  Attributes:
    name: For reports.
    flops_per_s: Dense matrix FLOP/s at the model's precision.
    memory_bytes_per_s: Bandwidth of the memory that holds weights and pages.
    memory_bytes: Its size; 0 if nobody has asked yet.
    matmul_efficiency: Share of `flops_per_s` that large products reach (MFU).
    memory_efficiency: Share of `memory_bytes_per_s` that streaming reaches.
    step_overhead_s: Seconds of every step that neither explains.
    source: The source of the figures.
    calibrated: Measured on the machine at hand rather than taken from a data sheet.
    dtype: The dtype it is fastest in; a simulation with `dtype='auto'` takes that.
    ici_bytes_per_s: Its rate to the other devices of its worker, one way, around a ring of them all. None counts
      nothing for what the devices of a worker send one another.
    ici_latency_s: Seconds of a hop from one device of a ring to the next, whatever it carries.
    dollars_per_hour: The price of one device. None is not known, and reports then tell no dollars; the chips that come
      with pdjax have none.
    watts: The power that one device draws; None is not known, as for prices.

  Raises:
    ValueError: if a rate is not positive (an infinite one takes no time), the size is negative, a share is none, the
      overhead or the latency is no time, a price or power is negative, or the dtype is unknown.
  """

  _said: ClassVar[str] = '{kind} {name} has {field}={value}'
  PRESETS: ClassVar[tuple[str, ...]] = ('generic_cpu', 'tpu_v5e', 'tpu_v5p', 'tpu_v6e', 'a100', 'h100', 'h200')

  name: str
  flops_per_s: Rate
  memory_bytes_per_s: Rate
  memory_bytes: Annotated[float, at_least(0, '0 (not known) or more')]
  matmul_efficiency: Share = 0.6
  memory_efficiency: Share = 0.8
  step_overhead_s: Seconds = 0.001
  source: str = ''
  calibrated: bool = False
  dtype: DtypeName = 'bfloat16'
  ici_bytes_per_s: Rate | None = None
  ici_latency_s: Seconds = 0.0
  dollars_per_hour: _Amount | None = None
  watts: _Amount | None = None

  def __post_init__(self):
    check_fields(self)

  @classmethod
  def generic_cpu(cls) -> 'ChipSpec':
    """A guess at two laptop cores in float32; reports call what rests on it uncalibrated."""
    return cls('generic CPU', 2e11, 2e10, 16e9, source='a guess', step_overhead_s=0.002, dtype='float32')

  @classmethod
  def tpu_v5e(cls) -> 'ChipSpec':
    return cls('TPU v5e', 197e12, 819e9, 16e9, source=_TPU, ici_bytes_per_s=90e9, ici_latency_s=_TPU_HOP_S)

  @classmethod
  def tpu_v5p(cls) -> 'ChipSpec':
    return cls('TPU v5p', 459e12, 2765e9, 95 * 2**30, source=_TPU, ici_bytes_per_s=180e9, ici_latency_s=_TPU_HOP_S)

  @classmethod
  def tpu_v6e(cls) -> 'ChipSpec':
    return cls('TPU v6e', 918e12, 1638e9, 32e9, source=_TPU, ici_bytes_per_s=180e9, ici_latency_s=_TPU_HOP_S)

  @classmethod
  def a100(cls) -> 'ChipSpec':
    return cls('A100-80', 312e12, 2039e9, 80e9, source=_GPU, ici_bytes_per_s=300e9, ici_latency_s=_NVLINK_HOP_S)

  @classmethod
  def h100(cls) -> 'ChipSpec':
    return cls('H100', 989e12, 3350e9, 80e9, source=_GPU, ici_bytes_per_s=450e9, ici_latency_s=_NVLINK_HOP_S)

  @classmethod
  def h200(cls) -> 'ChipSpec':
    return cls('H200', 989e12, 4800e9, 141e9, source=_GPU, ici_bytes_per_s=450e9, ici_latency_s=_NVLINK_HOP_S)


@dataclasses.dataclass(frozen=True, slots=True)
class LinkSpec:
  """The link that carries KV from one worker to another.

  Attributes:
    bytes_per_s: One way, between two devices.
    latency_s: Seconds of a transfer that do not depend on its size.
    source: The source of the figures.

  Raises:
    ValueError: if the rate is not positive (an infinite one takes no time), or the latency is no time.
  """

  bytes_per_s: Rate = 10e9
  latency_s: Seconds = 0.001
  source: str = 'a guess'

  def __post_init__(self):
    check_fields(self)
