"""The returns of lost workers, with the parts of the time they took, and the workers that did not return."""

import dataclasses
from typing import Any

from pdjax.metrics.numbers import number
from pdjax.serving.events import Comeback, WorkerBack, WorkerLost


@dataclasses.dataclass(frozen=True, slots=True)
class WorkerReturn:
  """One return of a worker.

  Attributes:
    worker: The worker.
    lost_s: The time it was lost, in seconds after the start of the run.
    seconds: From then until it took orders again.
    error: The reason it was lost.
    comeback: The parts of that time; None if its process went on, and only its pages were new.
  """

  worker: str
  lost_s: float
  seconds: float
  error: str
  comeback: Comeback | None = None

  @classmethod
  def of(cls, lost: WorkerLost, back: WorkerBack) -> 'WorkerReturn':
    """The return between two events of the log."""
    return cls(lost.worker, lost.ended_s, back.ended_s - lost.ended_s, lost.error, back.comeback)

  @property
  def parts_s(self) -> dict[str, float]:
    """Seconds of each part, by what a reader calls it; empty if its process went on."""
    took = self.comeback
    if took is None:
      return {}
    failed = {'failed tries': took.failed_s} if took.tries > 1 else {}
    return failed | {
      'process start': took.start_s, 'weights': took.load_s, 'compiling': took.compile_s, 'connecting': took.connect_s
    }  # fmt: skip

  def to_json(self) -> dict[str, Any]:
    """The return as plain data, seconds throughout."""
    return {
      'worker': self.worker, 'lost': self.lost_s, 'seconds': self.seconds, 'error': self.error,
      'tries': None if self.comeback is None else self.comeback.tries, 'parts': self.parts_s,
    }  # fmt: skip

  def __str__(self) -> str:
    if self.comeback is None:
      return f'{self.worker} was back after {number(self.seconds, 1)} s, in the same process'
    parts = ', '.join(f'{name} {number(seconds, 1)}' for name, seconds in self.parts_s.items())
    return f'{self.worker} was back after {number(self.seconds, 1)} s: {parts}'


@dataclasses.dataclass(frozen=True, slots=True)
class WorkerAbsence:
  """A worker that was lost and not back when the run ended.

  Attributes:
    worker: The worker.
    lost_s: The time it was lost, in seconds after the start of the run.
    error: The reason, or the reason it did not come back, where that was known.
    returning: Whether it was being brought back when the run ended.
  """

  worker: str
  lost_s: float
  error: str
  returning: bool

  def __str__(self) -> str:
    ending = 'was not back when the run ended' if self.returning else 'did not come back'
    return f'{self.worker} was lost at {number(self.lost_s, 1)} s and {ending}: {self.error}'
