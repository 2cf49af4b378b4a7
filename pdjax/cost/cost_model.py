"""The protocol of a cost model, which predicts times for a simulator or a policy."""

from collections.abc import Sequence
from typing import Protocol

from pdjax.types.cluster import WorkerSpec
from pdjax.types.model import ModelSpec


class CostModel(Protocol):
  """Predicts the seconds of a step and of a transfer.

  Its attribute `dispatch_s`, if it has one, is the seconds of each further program of a step in groups of layers.
  """

  def step_seconds(
    self,
    model: ModelSpec,
    worker: WorkerSpec,
    chunks: Sequence[tuple[int, int]],
    contexts: Sequence[int],
    steps: int,
  ) -> float:
    """Seconds of one step.

    Args:
      model: The model.
      worker: The worker that runs it.
      chunks: (tokens already cached, new tokens) of each prompt chunk.
      contexts: Cached tokens of each decoding sequence when the step begins.
      steps: Decode steps in it.
    """

  def transfer_seconds(self, model: ModelSpec, source: WorkerSpec, target: WorkerSpec, tokens: float) -> float:
    """Seconds to move the KV of so many tokens, whole pages counted; of fewer tokens where only some layers travel."""
