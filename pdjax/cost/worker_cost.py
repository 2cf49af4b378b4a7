"""A worker's own cost model: what its steps and transfers are predicted to take, for policies."""

import functools
from collections.abc import Callable, Sequence

from pdjax.cost.cost_model import CostBase
from pdjax.types.model import ModelSpec
from pdjax.types.pools import sent_bytes
from pdjax.types.worker import WorkerSpec


class WorkerCost:
  """The cost model of a run, bound to the model served and to one worker (or a place that only holds pages).

  It predicts in plain Python and starts nothing; what is asked again with the same numbers is looked up.

  Attributes:
    model: The model served.
    spec: The worker, its page size filled in.
    calibrated: Whether the constants of the cost model, or of the worker's own chip, were measured.
  """

  def __init__(self, cost: CostBase, model: ModelSpec, spec: WorkerSpec):
    """Bind a cost model, as `as_cost` answers it."""
    self.model = model
    self.spec = spec
    self.calibrated = cost.is_calibrated([spec])
    self._cost = cost
    self._step: Callable[..., float] = functools.lru_cache(64)(functools.partial(cost.step_seconds, model, spec))
    self._prefill: Callable[..., float] = functools.lru_cache(4096)(self._sum_of_chunks)

  def step_seconds(self, chunks: Sequence[tuple[int, int]], contexts: Sequence[int], steps: int = 1) -> float:
    """Seconds of one step; see `CostModel.step_seconds`.

    Args:
      chunks: (tokens already cached, new tokens) of each prompt chunk.
      contexts: Cached tokens of each decoding sequence when the step begins.
      steps: Decode steps in it.
    """
    return self._step(tuple(chunks), tuple(contexts), steps)

  def prefill_seconds(self, new_tokens: int, cached_tokens: int = 0, budget: int | None = None) -> float:
    """Seconds of the steps that compute so many tokens of one prompt, with nothing beside them.

    Args:
      new_tokens: Tokens to compute; 0 takes no time.
      cached_tokens: Tokens of the prompt before them.
      budget: Most tokens of a chunk; None, or more, is the worker's `max_step_tokens`.

    Raises:
      ValueError: if `budget` is below 1.
    """
    most = self.spec.max_step_tokens
    if budget is not None and budget < 1:
      raise ValueError(f'prefill_seconds of worker {self.spec.name!r} is given budget={budget}, expected 1 or more.')
    return self._prefill(new_tokens, cached_tokens, most if budget is None else min(budget, most))

  def decode_seconds(self, contexts: Sequence[int], steps: int = 1) -> float:
    """Seconds of so many decode steps in a row of sequences with these tokens cached; no sequence takes no time."""
    return self._step((), tuple(contexts), steps) if contexts else 0.0

  def transfer_seconds(self, target: 'WorkerCost | WorkerSpec', num_bytes: float) -> float:
    """Seconds to move so many bytes of the cache from here to another place."""
    return self._cost.transfer_seconds(self.model, self.spec, _spec_of(target), num_bytes)

  def sent_seconds(self, target: 'WorkerCost | WorkerSpec', tokens: int) -> float:
    """Seconds to move a computed sequence of so many tokens from here to another place, in one transfer."""
    return self.transfer_seconds(target, sent_bytes(self.model, self.spec, _spec_of(target), tokens))

  def _sum_of_chunks(self, new_tokens: int, cached_tokens: int, budget: int) -> float:
    stop, seconds = cached_tokens + new_tokens, 0.0
    for start in range(cached_tokens, stop, budget):
      seconds += self._cost.step_seconds(self.model, self.spec, [(start, min(budget, stop - start))], [], 1)
    return seconds


def _spec_of(target: 'WorkerCost | WorkerSpec') -> WorkerSpec:
  return target.spec if isinstance(target, WorkerCost) else target
