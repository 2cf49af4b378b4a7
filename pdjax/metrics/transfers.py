"""The time that transfers took and the part of it that was hidden, from the timeline of a run."""

import dataclasses

import numpy as np

from pdjax.metrics.span_rows import SpanRows
from pdjax.metrics.stats import Stats
from pdjax.metrics.timeline import Timeline


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
    rows = timeline.spans.rows[timeline.spans.is_transfer]
    rows = rows[rows['trip'] >= 0]
    trips = timeline.spans.trips[rows['trip']]
    wire_s = trips['arrived_s'] - trips['wire_began_s']
    return cls(
      count=len(rows),
      failed=len(timeline.failed_transfers),
      bytes=int(rows['wire_bytes'].sum()),
      pieces=int(trips['pieces'].sum()),
      queued=Stats.of_seconds(rows['began_s'] - rows['submitted_s']),
      posted=Stats.of_seconds(trips['wire_began_s'] - rows['began_s']),
      wire=Stats.of_seconds(wire_s),
      admitting=Stats.of_seconds(rows['ended_s'] - trips['arrived_s']),
      wire_s=sum(wire_s.tolist()),
      hidden_s=_hidden_s(rows, trips, timeline.spans),
    )


def _hidden_s(transfers: np.ndarray, trips: np.ndarray, spans: SpanRows) -> float:
  """Seconds on the wire in which the source of a transfer computed prompts; steps of one worker never overlap."""
  computing = spans.rows[spans.of_kind('prefill') | spans.of_kind('fused')]
  hidden_s = 0.0
  for worker in dict.fromkeys(transfers['worker'].tolist()):
    own = computing[computing['worker'] == worker]
    if not len(own):
      continue
    wires = trips[transfers['worker'] == worker]
    edges_s = np.sort(np.stack([own['began_s'], own['ended_s']], axis=1), axis=0).ravel()  # begin, end, begin ...
    busy_s = np.concatenate([[0.0], np.cumsum(np.diff(edges_s) * (np.arange(len(edges_s) - 1) % 2 == 0))])
    began_s, arrived_s = (np.interp(wires[name], edges_s, busy_s) for name in ('wire_began_s', 'arrived_s'))
    hidden_s += float((arrived_s - began_s).sum())
  return hidden_s
