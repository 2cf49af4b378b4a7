"""The protocol of a cost model, which predicts times for a simulator or a policy."""

import abc
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from pdjax.types.hardware import ChipSpec
from pdjax.types.model import ModelSpec
from pdjax.types.worker import WorkerSpec

RunSeconds = Callable[[Sequence[int], int], np.ndarray]


class CostModel(Protocol):
  """Predicts the seconds of a step and of a transfer.

  What else it may say is in `CostBase`, whose defaults count for a class that says nothing of it.
  """

  @abc.abstractmethod
  def step_seconds(
    self,
    model: ModelSpec,
    worker: WorkerSpec,
    chunks: Sequence[tuple[int, int]],
    contexts: Sequence[int],
    steps: int,
  ) -> float:
    """Seconds of one step of a worker.

    Args:
      model: The model.
      worker: The worker that runs it.
      chunks: (tokens already cached, new tokens) of each prompt chunk.
      contexts: Cached tokens of each decoding sequence when the step begins.
      steps: Decode steps in it.
    """

  @abc.abstractmethod
  def transfer_seconds(self, model: ModelSpec, source: WorkerSpec, target: WorkerSpec, num_bytes: float) -> float:
    """Seconds to move so many bytes of the cache from one worker to another, whole pages counted.

    `pdjax.types.pools.sent_bytes` says how many a sequence has.
    """


class CostBase(CostModel):
  """A cost model, and what it says of the machine that it has in mind.

  Attributes:
    chip: One device, whose memory bounds what fits; None if it is no chip in particular.
    calibrated: Whether its constants were measured on the machine at hand.
    shared_host: Whether the devices are virtual ones of one CPU, which have one memory in common.
    dispatch_s: Seconds that each further program of a step costs that runs in groups of layers.
  """

  chip: ChipSpec | None = None
  calibrated: bool = False
  shared_host: bool = False
  dispatch_s: float = 0.0

  @property
  def name(self) -> str:
    """Its class, for messages."""
    return type(self).__name__

  def chip_of(self, worker: WorkerSpec) -> ChipSpec | None:
    """One device of a worker: of its own chip, or of the one that the model has in mind; None if nothing says."""
    return worker.chip or self.chip

  def is_calibrated(self, workers: Iterable[WorkerSpec]) -> bool:
    """Whether its constants, and the chips that these workers have of their own, were measured."""
    return self.calibrated and all(worker.chip is None or worker.chip.calibrated for worker in workers)

  def runs(self, model: ModelSpec, worker: WorkerSpec) -> RunSeconds | None:
    """A function that tells how long decode steps in a row of a worker take; None has each asked for when it begins.

    Given the cached tokens of each sequence when the first begins, and a number of steps in each of which every
    sequence gets a token, it tells the seconds until the end of each, `[steps]`; those of a step must not depend on how
    many are asked about. With it a simulator can leap over steps at which nothing happens.
    """
    return None


def as_cost(cost: CostModel) -> CostBase:
  """A cost model with all that `CostBase` says of one, where it is a class that has the two methods alone too.

  Raises:
    ValueError: if it is none: it lacks a method, or one takes something else.
  """
  if not isinstance(cost, CostBase) or type(cost) not in _CHECKED:
    _check(cost)
  return cost if isinstance(cost, CostBase) else _Completed(cost)


_CHECKED: set[type] = set()
_PARAMETERS = {
  'step_seconds': ['model', 'worker', 'chunks', 'contexts', 'steps'],
  'transfer_seconds': ['model', 'source', 'target', 'num_bytes'],
}


def _check(cost: Any) -> None:
  """Raise ValueError unless it has the methods of a cost model, which take what that is told."""
  if isinstance(cost, type):
    raise ValueError(f'cost is the class {cost.__name__}, expected one of its objects; call it.')
  for name, wanted in _PARAMETERS.items():
    method = getattr(cost, name, None)
    if not callable(method):
      raise ValueError(f'cost is a {type(cost).__name__} without {name}, which a cost model must have; see CostModel.')
    parameters = list(inspect.signature(method).parameters.values())
    is_open = any(one.kind is inspect.Parameter.VAR_POSITIONAL for one in parameters)
    if not is_open and (found := [one.name for one in parameters])[: len(wanted)] != wanted:
      raise ValueError(
        f'{type(cost).__name__}.{name} takes {", ".join(found)}, expected {", ".join(wanted)}; see CostModel, which '
        'is told of transfers in bytes (before, in tokens).'
      )
  _CHECKED.add(type(cost))


class _Completed(CostBase):
  """A cost model of a class of its own; it may say by itself what `CostBase` says."""

  def __init__(self, cost: CostModel):
    self._cost = cost
    for name in ('chip', 'calibrated', 'shared_host', 'dispatch_s'):
      setattr(self, name, getattr(cost, name, getattr(CostBase, name)))

  @property
  def name(self) -> str:
    """The class of the user."""
    return type(self._cost).__name__

  def step_seconds(self, *args: Any, **kwargs: Any) -> float:
    return self._cost.step_seconds(*args, **kwargs)

  def transfer_seconds(self, *args: Any, **kwargs: Any) -> float:
    return self._cost.transfer_seconds(*args, **kwargs)

  def runs(self, model: ModelSpec, worker: WorkerSpec) -> RunSeconds | None:
    make = getattr(self._cost, 'runs', None)
    return None if make is None else make(model, worker)
