"""The cut of copies of pages on a TPU: its parameters, and the vector memory that follows from them."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
  """Tuning of the copies.

  Attributes:
    units_in_flight: Pages (of every layer) whose plain copies are under way at once.
    slice_pages: Page numbers in SMEM at once.
    cores: Cores that share the slices; 2 where one device is two cores (v4, v5p).
    direct: Whether plain copies go from HBM to HBM; otherwise they pass through VMEM, as conversions do.
    buffer_bytes: VMEM for the four buffers of a copy that converts, unless one page of one layer needs more.
  """

  units_in_flight: int = 32
  slice_pages: int = 1024
  cores: int = 1
  direct: bool = True
  buffer_bytes: int = 8 * 2**20


def group_layers(config: Config, num_layers: int, page_bytes: int) -> int:
  """Layers of one converted unit, when one page of one layer takes `page_bytes` on both sides together."""
  return max(1, min(num_layers, config.buffer_bytes // (2 * page_bytes)))


def vmem_bytes(config: Config, num_layers: int, page_bytes: int) -> int:
  """VMEM that a converting copy uses."""
  return 2 * page_bytes * group_layers(config, num_layers, page_bytes)
