"""How long things take: what a simulator or a policy asks."""

from collections.abc import Sequence
from typing import Protocol

from pdjax.types.cluster import WorkerSpec
from pdjax.types.model import ModelSpec


class CostModel(Protocol):
  """Predicts the seconds of a pass and of a transfer.

  It may say with an attribute `dispatch_s` what each further program of a pass costs that runs in groups of layers.
  """

  def step_seconds(
    self,
    model: ModelSpec,
    worker: WorkerSpec,
    chunks: Sequence[tuple[int, int]],
    contexts: Sequence[int],
    steps: int,
  ) -> float:
    """Seconds of one pass.

    Args:
      model: The model.
      worker: The worker that runs it.
      chunks: (tokens already cached, new tokens) of each prompt chunk.
      contexts: Cached tokens of each decoding sequence when the pass begins.
      steps: Decode steps in the pass.
    """

  def transfer_seconds(self, model: ModelSpec, source: WorkerSpec, target: WorkerSpec, tokens: float) -> float:
    """Seconds to move the KV of so many tokens, whole pages counted; of fewer tokens where only some layers travel."""
