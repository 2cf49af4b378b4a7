"""The account of a run's time: the parts of the time to the first and to the second token, which sum to the whole."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from pdjax.metrics.numbers import digits_below
from pdjax.metrics.request_rows import RequestRows


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
  def of(cls, requests: RequestRows) -> 'Account':
    """The account of those that completed."""
    done = requests.completed
    ttfts = np.stack([requests.queue_s, requests.prefill_s, requests.ttft_s], axis=1)
    handoffs = np.column_stack([requests.handoff_parts_s, requests.handoff_s])
    queue, prefill, _, ttft_closes_s = _means(ttfts[done])
    wait, wire, admit, step, _, handoff_closes_s = _means(handoffs[done])
    return cls(queue, prefill, wait, wire, admit, step, ttft_closes_s, handoff_closes_s)


def sum_line(name: str, whole_ms: float | None, parts_ms: Mapping[str, float | None]) -> str:
  """A mean and its parts, all with as many digits, so that a reader can add them up."""
  digits = digits_below(whole_ms)
  figures = ['-' if value is None else f'{value:.{digits}f}' for value in (whole_ms, *parts_ms.values())]
  return f'{name} {figures[0]} = {" + ".join(map(" ".join, zip(parts_ms, figures[1:], strict=True)))} ms'


def _means(table_s: np.ndarray) -> tuple[float | None, ...]:
  """Mean of each column in ms; then the largest amount by which the last is not the sum of the others, in s."""
  table_s = table_s[~np.isnan(table_s).any(axis=1)]
  if not len(table_s):
    return (None,) * (table_s.shape[1] + 1)
  closes_s = np.abs(table_s[:, :-1].sum(axis=1) - table_s[:, -1]).max()
  return (*(float(mean) * 1e3 for mean in table_s.mean(axis=0)), float(closes_s))
