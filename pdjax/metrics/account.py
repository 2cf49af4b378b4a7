"""The account of a run's time: the parts of the time to the first and to the second token, which sum to the whole."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from pdjax.metrics.numbers import digits_below
from pdjax.metrics.timeline import RequestTimeline


@dataclasses.dataclass(frozen=True, slots=True)
class Account:
  """The parts of the time to the first and to the second token: means in milliseconds over completed requests.

  TTFT = queue + prefill. Hand-off = wait + wire + admit + step, over requests with a second token; `HandOff` says
  what each is. Every part comes from its own two stamps and none is a remainder, so that the sums can be checked.

  Attributes:
    ttft_closes_s: The most by which a request's parts miss its TTFT, in seconds.
    handoff_closes_s: The same for the hand-off.
  """

  queue_ms: float | None = None
  prefill_ms: float | None = None
  wait_ms: float | None = None
  wire_ms: float | None = None
  admit_ms: float | None = None
  step_ms: float | None = None
  ttft_closes_s: float | None = None
  handoff_closes_s: float | None = None

  @classmethod
  def of(cls, requests: Iterable[RequestTimeline]) -> 'Account':
    """The account of these requests."""
    ttfts: list[tuple[float, ...]] = []  # the parts, then the whole, in seconds
    handoffs: list[tuple[float, ...]] = []
    for request in requests:
      if request.ttft_s is not None and request.queue_s is not None and request.prefill_s is not None:
        ttfts.append((request.queue_s, request.prefill_s, request.ttft_s))
      parts = request.handoff
      if parts is not None and request.handoff_s is not None:
        handoffs.append((parts.wait_s, parts.wire_s, parts.admit_s, parts.step_s, request.handoff_s))
    queue, prefill, _, ttft_closes_s = _means(ttfts)
    wait, wire, admit, step, _, handoff_closes_s = _means(handoffs, columns=5)
    return cls(queue, prefill, wait, wire, admit, step, ttft_closes_s, handoff_closes_s)


def sum_line(name: str, whole_ms: float | None, parts_ms: Mapping[str, float | None]) -> str:
  """A mean and its parts, all with as many digits, so that a reader can add them up."""
  digits = digits_below(whole_ms)
  figures = ['-' if value is None else f'{value:.{digits}f}' for value in (whole_ms, *parts_ms.values())]
  return f'{name} {figures[0]} = {" + ".join(map(" ".join, zip(parts_ms, figures[1:], strict=True)))} ms'


def _means(rows: Sequence[tuple[float, ...]], columns: int = 3) -> tuple[float | None, ...]:
  """Mean of each column in ms; then the largest amount by which the last is not the sum of the others, in s."""
  if not rows:
    return (None,) * (columns + 1)
  table = np.asarray(rows, np.float64)
  closes_s = np.abs(table[:, :-1].sum(axis=1) - table[:, -1]).max()
  return (*(float(mean) * 1e3 for mean in table.mean(axis=0)), float(closes_s))
