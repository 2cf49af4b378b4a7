"""A workload that replays a trace, faster or slower than it was recorded if that is asked for."""

import dataclasses
import functools
import os
from typing import ClassVar

from pdjax.types.checked import Count, Positive, as_path, check_fields
from pdjax.types.request import SLO, SamplingParams
from pdjax.workload.arrivals import Listed
from pdjax.workload.traces import Trace, TraceFormat, prompt_of, read_trace
from pdjax.workload.workload import WorkloadContext, mean_rate

_NO_END = SamplingParams()


@dataclasses.dataclass(frozen=True, kw_only=True)
class TraceWorkload:
  """The requests of a trace, each at its recorded time whatever becomes of the others, with random tokens.

  Their prompts begin alike where their ids of blocks (`Request.block_hashes`) are alike, on devices too: the tokens of
  a block are drawn by its id (`BlockTokens`). What a prompt repeats of an answer is not known.

  Attributes:
    path: The file, see `read_trace`.
    format: Its format; None tells it from the first line.
    rate: The pace: 2 lets requests come twice as fast as they were recorded.
    max_requests: The first of them only, if given.
    sampling: Temperature and the like. Requests end at their recorded lengths; `max_tokens`, to be left out here, is
      the length of the longest answer of the file, and `ignore_eos` is set.
    slo: Latency limits of every request.

  Raises:
    ValueError: if a field is of another type or out of range, or `sampling` says where requests end.
  """

  path: str
  format: TraceFormat | None = None
  rate: Positive = 1.0
  max_requests: Count | None = None
  sampling: SamplingParams = SamplingParams()
  slo: SLO | None = None
  burstiness: ClassVar[None] = None
  max_concurrency: ClassVar[None] = None
  seed: ClassVar[None] = None

  def __post_init__(self):
    object.__setattr__(self, 'path', as_path(self.path))
    check_fields(self)
    for name in ('max_tokens', 'stop', 'stop_token_ids'):
      if (value := getattr(self.sampling, name)) != getattr(_NO_END, name):
        raise ValueError(
          f'TraceWorkload has sampling.{name}={value!r}, but the requests of a trace end at their recorded lengths; '
          'leave it out.'
        )

  @property
  def num_requests(self) -> int:
    return len(self._trace.requests[: self.max_requests])

  @property
  def request_rate(self) -> float:
    """Requests per second between the first and the last; infinite if all come at once."""
    return mean_rate([request.arrival_s / self.rate for request in self._trace.requests[: self.max_requests]])

  def arrivals(self, context: WorkloadContext) -> Listed:
    trace = self._trace
    max_tokens = trace.requests[0].sampling.max_tokens
    sampling = dataclasses.replace(self.sampling, max_tokens=max_tokens, ignore_eos=True)
    requests = [
      dataclasses.replace(
        request,
        prompt=prompt_of(
          request.prompt_len, context.vocab_size, index, request.block_hashes, request.block_size, request.tenant
        ),
        sampling=sampling,
        arrival_s=request.arrival_s / self.rate,
        slo=self.slo,
      )
      for index, request in enumerate(trace.requests[: self.max_requests])
    ]
    return Listed(requests, trace.output_lens)

  @property
  def _trace(self) -> Trace:
    stat = os.stat(self.path)
    return _read(os.path.abspath(self.path), self.format, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=2)
def _read(path: str, format: TraceFormat | None, mtime_ns: int, num_bytes: int) -> Trace:
  """A trace that was read, until its file changes: a report asks for its figures one by one."""
  return read_trace(path, format)
