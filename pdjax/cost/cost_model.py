"""The protocol of a cost model, which predicts times for a simulator or a policy."""

import abc
from collections.abc import Sequence
from typing import Any, Protocol

from pdjax.types.hardware import ChipSpec
from pdjax.types.model import ModelSpec
from pdjax.types.worker import WorkerSpec


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


def as_cost(cost: CostModel) -> CostBase:
  """A cost model with all that `CostBase` says of one, where it is a class that has the two methods alone too."""
  return cost if isinstance(cost, CostBase) else _Completed(cost)


class _Completed(CostBase):
  """A cost model of a class of its own; it may say by itself what `CostBase` says."""

  def __init__(self, cost: CostModel):
    self._cost = cost
    for name in ('chip', 'calibrated', 'shared_host', 'dispatch_s'):
      setattr(self, name, getattr(cost, name, getattr(CostBase, name)))

  def step_seconds(self, *args: Any, **kwargs: Any) -> float:
    return self._cost.step_seconds(*args, **kwargs)

  def transfer_seconds(self, *args: Any, **kwargs: Any) -> float:
    return self._cost.transfer_seconds(*args, **kwargs)
