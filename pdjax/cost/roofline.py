"""A step takes as long as its FLOPs or its bytes, whichever is longer, and a fixed overhead."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from pdjax.cost.cost_model import CostBase, RunSeconds
from pdjax.cost.decode_runs import decode_run
from pdjax.types.checked import Count, check_fields
from pdjax.types.hardware import DTYPE_BYTES, ChipSpec, LinkSpec
from pdjax.types.model import ModelSpec
from pdjax.types.worker import Role, WorkerSpec


@dataclasses.dataclass(frozen=True)
class Roofline(CostBase):
  """The roofline model (Williams et al. 2009) of a transformer's steps.

  A step reads the weights once, of experts those that its tokens are expected to choose. What the devices of a worker
  do not cut of a cache, each of them reads; on its way to another worker it crosses once. The rates are those of the
  chip's own dtype, whatever that of a worker's weights.

  Where a chip says its interconnect, each layer ends two sums over the devices of its worker, of what attention and
  feed-forward give for each token: all-reduces around a ring, in which every device sends `2 (tp - 1) / tp` of the
  bytes in `2 (tp - 1)` hops, while nothing is computed.

  Attributes:
    chip: One device of a worker without a chip of its own (`WorkerSpec.chip`). A worker of `tp` devices has `tp` times
      its rates.
    link: The link between two workers; transfers between them use `min(tp)` such links side by side.
    dtype_bytes: Bytes of a weight of workers that do not say the dtype of theirs.
    shared_host: The devices are virtual ones of one CPU: more of them are not faster, and nothing is sent among them.
    host_link: The link between one device of a worker and the memory of a host (`HostPlace`), of which a worker of `tp`
      devices uses as many; None is `link`.

  Raises:
    ValueError: if a field is of another type.
  """

  chip: ChipSpec = dataclasses.field(default_factory=ChipSpec.generic_cpu)
  link: LinkSpec = LinkSpec()
  dtype_bytes: Count = 4
  shared_host: bool = False
  host_link: LinkSpec | None = None

  def __post_init__(self):
    check_fields(self)

  @property
  def calibrated(self) -> bool:  # type: ignore[override]  # a property here, as `chip` says it
    """Whether its constants were measured on the machine at hand."""
    return self.chip.calibrated

  @property
  def dispatch_s(self) -> float:  # type: ignore[override]
    """Seconds that each further program of a step costs."""
    return self.chip.step_overhead_s

  def step_seconds(
    self,
    model: ModelSpec,
    worker: WorkerSpec,
    chunks: Sequence[tuple[int, int]],
    contexts: Sequence[int],
    steps: int,
  ) -> float:
    """Seconds of one step; see `CostModel`."""
    flops_per_s, bytes_per_s = self._rates(worker)
    # The input embedding is read a row a token, not whole.
    weight_bytes = self._weight_bytes(worker)
    shards = min(worker.tp, model.kv_heads)
    tokens = sum(new for _, new in chunks) + len(contexts)
    fixed_s = self._fixed_s(model, worker, tokens)
    seconds = 0.0
    for step in range(steps):
      ahead = [context + step for context in contexts]
      flops = tokens * model.token_flops() + (len(chunks) + len(contexts)) * model.unembed_flops()
      flops += sum(model.attention_flops(new, cached) for cached, new in chunks)
      flops += model.decode_attention_flops(ahead)
      cached = worker.tp * model.read_bytes(worker.cached_dtype, chunks, ahead, shards)  # on all devices
      read = model.read_params(tokens) * weight_bytes + cached
      seconds += max(flops / flops_per_s, read / bytes_per_s) + fixed_s
    return seconds

  def runs(self, model: ModelSpec, worker: WorkerSpec) -> RunSeconds:
    """A function that tells how long decode steps in a row take; see `CostBase`."""
    flops_per_s, bytes_per_s = self._rates(worker)
    weight_bytes = self._weight_bytes(worker)
    row_flops, read_params = model.token_flops() + model.unembed_flops(), functools.lru_cache(4096)(model.read_params)
    run = decode_run(model, worker.cached_dtype, min(worker.tp, model.kv_heads))

    def seconds(contexts: Sequence[int], steps: int) -> np.ndarray:
      batch = len(contexts)
      attention, cached = run(contexts, steps)
      computed_s = (batch * row_flops + attention) / flops_per_s
      read_s = (read_params(batch) * weight_bytes + worker.tp * cached) / bytes_per_s
      return (np.maximum(computed_s, read_s) + self._fixed_s(model, worker, batch)).cumsum()

    return seconds

  def transfer_seconds(self, model: ModelSpec, source: WorkerSpec, target: WorkerSpec, num_bytes: float) -> float:
    """Seconds to move so many bytes of the cache; see `CostModel`."""
    to_host = Role.HOLD in (source.role, target.role)
    link = self.host_link if to_host and self.host_link is not None else self.link
    links = 1 if self.shared_host else max(source.tp, target.tp) if to_host else min(source.tp, target.tp)
    return link.latency_s + num_bytes / (link.bytes_per_s * links)

  def _rates(self, worker: WorkerSpec) -> tuple[float, float]:
    """FLOPs and bytes a second of all devices of a worker."""
    chip, devices = worker.chip or self.chip, 1 if self.shared_host else worker.tp
    return (
      chip.flops_per_s * chip.matmul_efficiency * devices,
      chip.memory_bytes_per_s * chip.memory_efficiency * devices,
    )

  def _weight_bytes(self, worker: WorkerSpec) -> int:
    return self.dtype_bytes if worker.weights is None else DTYPE_BYTES[worker.weights]

  def _fixed_s(self, model: ModelSpec, worker: WorkerSpec, tokens: int) -> float:
    """Seconds of a step beside FLOPs and bytes: the overhead, and the sums over the worker's devices."""
    chip, tp = worker.chip or self.chip, worker.tp
    if tp == 1 or self.shared_host or chip.ici_bytes_per_s is None:
      return chip.step_overhead_s
    sent = 2 * (tp - 1) / tp * tokens * model.embed_dim * self._weight_bytes(worker)
    one_s = sent / chip.ici_bytes_per_s + 2 * (tp - 1) * chip.ici_latency_s
    return chip.step_overhead_s + 2 * model.num_layers * one_s
