"""Places that hold pages and run no steps: memory of a host beside that of the workers' devices."""

import dataclasses
from typing import ClassVar

from pdjax.types.cache import KVDtypeName
from pdjax.types.checked import Count, check_fields
from pdjax.types.model import ModelSpec
from pdjax.types.pools import PoolSpecs
from pdjax.types.worker import PageSize, Role, WorkerSpec


@dataclasses.dataclass(frozen=True, slots=True)
class HostPlace:
  """Pages of the prefix cache in a host's memory, with a way to each worker and one from each.

  What is there is what a policy sent there (`Transfer` of `view.blocks(request)`). When it is full, the blocks that
  were used longest ago go first. On Ray it is a process of its own, on as many hosts as there are for all places.

  The memory is pageable, on GPUs and TPUs too: XLA fails to write single pages into a pinned host array of a GPU
  (openxla/xla issue 34565).

  Attributes:
    name: Unique among the workers and places.
    bytes: Memory for pages, all of which is taken as the run is built.
    page_size: Tokens per page; None is that of the workers if they have one, and else the config's.
    kv_dtype: Of its pages; None is that of the workers if they have one, and else the config's. Pages are converted on
      their way as between workers, and what loses something by that is no hit for who would not have lost it.

  Raises:
    ValueError: if a field is of another type or out of range.
  """

  _said: ClassVar[str] = 'place {name} has {field}={value}'

  name: str
  bytes: Count
  page_size: PageSize | None = None
  kv_dtype: KVDtypeName | None = None

  def __post_init__(self):
    check_fields(self)

  def as_spec(self, model: ModelSpec, page_size: int, kv_dtype: KVDtypeName) -> WorkerSpec:
    """The place as books and backends have it beside workers: as many pages as fit, and no steps.

    Args:
      model: The model whose pages it holds.
      page_size: Tokens per page, where it has none of its own.
      kv_dtype: Of its pages, where it has none of its own.

    Raises:
      ValueError: if no page fits.
    """
    spec = WorkerSpec(
      self.name,
      Role.HOLD,
      num_pages=1,
      max_sequences=1,
      page_size=self.page_size or page_size,
      kv_dtype=self.kv_dtype or kv_dtype,
    )
    page_bytes = PoolSpecs.of(model, spec).page_bytes
    if self.bytes < page_bytes:
      raise ValueError(
        f'place {self.name!r} has bytes={self.bytes}, but one page of {spec.page_size} tokens in {spec.kv_dtype} takes '
        f'{page_bytes}; raise bytes, or lower page_size.'
      )
    return dataclasses.replace(spec, num_pages=self.bytes // page_bytes)
