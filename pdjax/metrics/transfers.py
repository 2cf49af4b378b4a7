"""The time that transfers took and the part of it that was hidden, from the timeline of a run."""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from pdjax.metrics.stats import Stats
from pdjax.metrics.timeline import BusySpan, Timeline


@dataclasses.dataclass(frozen=True, slots=True)
class TransferFigures:
  """The transfers of a run that ended well.

  A transfer is queued from its order until its pages are gathered on the source, posted until the first piece leaves
  there, on the wire until the last has arrived, and admitting until steps of the target find it.

  Attributes:
    count: The number of them.
    failed: The number that failed, had no end by their deadline, or were lost with a worker.
    bytes: Bytes put onto target devices, all together.
    pieces: Arrays that went from one device to another, all together.
    queued: Seconds of each, as the following.
    posted: From gathered to leaving.
    wire: From leaving to arrived.
    admitting: From arrived to written.
    wire_s: Seconds on the wire, all together.
    hidden_s: Those of them in which the source computed prompts.
  """

  count: int
  failed: int
  bytes: int
  pieces: int
  queued: Stats
  posted: Stats
  wire: Stats
  admitting: Stats
  wire_s: float
  hidden_s: float

  @property
  def overlap_share(self) -> float | None:
    """The share of wire time hidden behind the computing of prompts; None without any."""
    return self.hidden_s / self.wire_s if self.wire_s > 0 else None

  @classmethod
  def of(cls, timeline: Timeline) -> 'TransferFigures':
    """The figures of a run."""
    spans = [span for span in timeline.spans if span.kind == 'transfer' and span.trip is not None]
    trips = [(span, span.trip) for span in spans if span.trip is not None]
    return cls(
      count=len(spans),
      failed=len(timeline.failed_transfers),
      bytes=sum(span.wire_bytes for span in spans),
      pieces=sum(trip.pieces for _, trip in trips),
      queued=Stats.of_seconds([span.began_s - span.submitted_s for span in spans]),
      posted=Stats.of_seconds([trip.wire_began_s - span.began_s for span, trip in trips]),
      wire=Stats.of_seconds([trip.arrived_s - trip.wire_began_s for _, trip in trips]),
      admitting=Stats.of_seconds([span.ended_s - trip.arrived_s for span, trip in trips]),
      wire_s=sum(trip.arrived_s - trip.wire_began_s for _, trip in trips),
      hidden_s=_hidden_s(spans, timeline.spans),
    )


def _hidden_s(transfers: Sequence[BusySpan], spans: Iterable[BusySpan]) -> float:
  """Seconds on the wire in which the source of a transfer computed prompts; steps of one worker never overlap."""
  computing: dict[str, list[tuple[float, float]]] = {}
  for span in spans:
    if span.kind in ('prefill', 'fused'):
      computing.setdefault(span.worker, []).append((span.began_s, span.ended_s))
  wires: dict[str, list[tuple[float, float]]] = {}
  for span in transfers:
    if span.trip is not None and span.worker in computing:
      wires.setdefault(span.worker, []).append((span.trip.wire_began_s, span.trip.arrived_s))
  hidden_s = 0.0
  for worker, wire in wires.items():
    edges_s = np.sort(np.array(computing[worker]), axis=0).ravel()  # begin, end, begin, end ...
    busy_s = np.concatenate([[0.0], np.cumsum(np.diff(edges_s) * (np.arange(len(edges_s) - 1) % 2 == 0))])
    began_s, arrived_s = (np.interp(times_s, edges_s, busy_s) for times_s in np.array(wire).T)
    hidden_s += float((arrived_s - began_s).sum())
  return hidden_s
