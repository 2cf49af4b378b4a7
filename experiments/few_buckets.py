"""Workers compiled for a few sizes of steps, where a benchmark knows which it will run: compiling takes longest."""

import dataclasses
from collections.abc import Iterable, Sequence

from pdjax.types import WorkerSpec


@dataclasses.dataclass(frozen=True)
class FewBuckets(WorkerSpec):
  """A worker whose prompt steps are all padded to `max_step_tokens`, and decode steps to one of `batches`.

  None is the usual batches.
  """

  batches: tuple[int, ...] | None = None

  @property
  def token_buckets(self) -> tuple[int, ...]:
    """The largest alone."""
    return (self.max_step_tokens,)

  @property
  def batch_buckets(self) -> tuple[int, ...]:
    """Those given."""
    return WorkerSpec.batch_buckets.fget(self) if self.batches is None else self.batches  # type: ignore[attr-defined]


def with_few_buckets(workers: Iterable[WorkerSpec], batches: Sequence[int] | None = None) -> tuple[FewBuckets, ...]:
  """The same workers, compiled for their largest prompt step and these batches alone."""
  return tuple(
    FewBuckets(
      **{field.name: getattr(worker, field.name) for field in dataclasses.fields(WorkerSpec)},
      batches=None if batches is None else tuple(batches),
    )
    for worker in workers
  )
