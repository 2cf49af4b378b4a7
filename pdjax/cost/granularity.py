"""The length from which on a chunk travels faster layer by layer than whole."""

import dataclasses
from collections.abc import Sequence

from pdjax.cost.cost_model import CostModel, as_cost
from pdjax.types.cluster import ways
from pdjax.types.model import ModelSpec
from pdjax.types.pools import sent_bytes
from pdjax.types.transfer import TransferSpec
from pdjax.types.worker import Role, WorkerSpec

_PROGRAMS = 2  # of a further transfer: a gather and a scatter; the layers run in groups in any case
# What a further transfer costs its host where nothing hides it: on the CPU where it was measured by what comes of it,
# 64 tokens arrive sooner whole, 256 by layers.
_ORDER_S = 0.2e-3


def choose_granularity(
  spec: TransferSpec, model: ModelSpec, workers: Sequence[WorkerSpec], cost: CostModel
) -> TransferSpec:
  """The spec with `layers_from` filled in, if it is left to the cost model; chunk by chunk if no length gains.

  Whole, a prompt's last chunk is on the wire for all of its transfer after its step has ended; in groups of layers only
  the last group is, at the price of more transfers. It pays from some length on: the shortest power of two of tokens
  for which every way from worker to worker is predicted to gain.
  """
  if spec.granularity != 'auto' or spec.layers_from is not None:
    return spec
  groups = len(spec.groups(model.num_layers))
  price_s = (groups - 1) * (_PROGRAMS * as_cost(cost).dispatch_s + _ORDER_S)
  layered = [(source, target) for source, target in ways(workers) if Role.PREFILL in source.roles]

  def gains(tokens: int) -> bool:
    def gained_s(source: WorkerSpec, target: WorkerSpec) -> float:
      size = sent_bytes(model, source, target, tokens)
      whole_s, last_s = (cost.transfer_seconds(model, source, target, part) for part in (size, size / groups))
      return whole_s - last_s - price_s

    return groups > 1 and all(gained_s(*way) > 0 for way in layered)

  most = max((source.max_step_tokens for source, _ in layered), default=0)
  lengths = [2**power for power in range(most.bit_length())]
  layers_from = next((tokens for tokens in lengths if gains(tokens)), None)
  return dataclasses.replace(spec, layers_from=layers_from, granularity='auto' if layers_from else 'chunk')
