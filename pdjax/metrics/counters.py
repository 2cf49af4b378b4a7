"""Transfers as counters, in the text format that Prometheus reads.

A figure that vLLM or SGLang export too has their name, so that dashboards made for them show it; the others have ours.

| name | what it counts here |
| --- | --- |
| `vllm:nixl_bytes_transferred` | bytes put onto target devices, a transfer |
| `vllm:nixl_num_descriptors` | pieces, a transfer |
| `vllm:nixl_xfer_time_seconds` | seconds on the wire, a transfer |
| `vllm:nixl_post_time_seconds` | seconds from gathered to leaving, a transfer |
| `vllm:nixl_num_failed_transfers_total` | transfers that did not end well |
| `vllm:num_preemptions_total` | times that a request was preempted |
| `sglang:kv_transfer_latency_ms` | milliseconds in which any of its pages were on the wire, a request |
| `sglang:kv_transfer_total_mb` | megabytes, a request |
| `sglang:kv_transfer_speed_gb_s` | gigabytes a second on the wire, a request |
| `sglang:num_transfer_failed_reqs_total` | requests with a transfer that did not end well |
| `pdjax:kv_transfer_queued_seconds` | seconds from the order to gathered, a transfer |
| `pdjax:kv_transfer_admitting_seconds` | seconds from arrived to written, a transfer |
| `pdjax:kv_transfer_hidden_seconds_total` | seconds on the wire while the source computed prompts |
"""

from collections.abc import Iterator, Sequence

from pdjax.metrics.timeline import Timeline
from pdjax.metrics.transfers import TransferFigures


def prometheus_text(timeline: Timeline) -> str:
  """Every counter of a run, a line each; summaries have a sum and a count."""
  return ''.join(f'{name} {value:.9g}\n' for name, value in counters(timeline).items())


def counters(timeline: Timeline) -> dict[str, float]:
  """Every counter of a run by the name of its series."""
  return dict(_series(timeline))


def _series(timeline: Timeline) -> Iterator[tuple[str, float]]:
  figures = TransferFigures.of(timeline)
  trips = [(span, span.trip) for span in timeline.spans if span.kind == 'transfer' and span.trip is not None]
  wire_s = [trip.arrived_s - trip.wire_began_s for _, trip in trips]
  yield from _summary('vllm:nixl_bytes_transferred', [span.wire_bytes for span, _ in trips])
  yield from _summary('vllm:nixl_num_descriptors', [trip.pieces for _, trip in trips])
  yield from _summary('vllm:nixl_xfer_time_seconds', wire_s)
  yield from _summary('vllm:nixl_post_time_seconds', [trip.wire_began_s - span.began_s for span, trip in trips])
  yield 'vllm:nixl_num_failed_transfers_total', figures.failed
  yield 'vllm:num_preemptions_total', len(timeline.preemptions)
  wires: dict[str, list[tuple[float, float]]] = {}
  sizes: dict[str, int] = {}
  for span, trip in trips:
    name = span.requests[0]
    wires.setdefault(name, []).append((trip.wire_began_s, trip.arrived_s))
    sizes[name] = sizes.get(name, 0) + span.wire_bytes
  latencies_s = {name: _covered_s(wire) for name, wire in wires.items()}
  yield from _summary('sglang:kv_transfer_latency_ms', [1e3 * seconds for seconds in latencies_s.values()])
  yield from _summary('sglang:kv_transfer_total_mb', [1e-6 * size for size in sizes.values()])
  speeds = [1e-9 * sizes[name] / seconds for name, seconds in latencies_s.items() if seconds > 0]
  yield from _summary('sglang:kv_transfer_speed_gb_s', speeds)
  yield 'sglang:num_transfer_failed_reqs_total', len(set(timeline.failed_transfers))
  yield from _summary('pdjax:kv_transfer_queued_seconds', [span.began_s - span.submitted_s for span, _ in trips])
  yield from _summary('pdjax:kv_transfer_admitting_seconds', [span.ended_s - trip.arrived_s for span, trip in trips])
  yield 'pdjax:kv_transfer_hidden_seconds_total', figures.hidden_s


def _covered_s(intervals: Sequence[tuple[float, float]]) -> float:
  """Seconds that lie in any of the intervals."""
  covered_s, until_s = 0.0, float('-inf')
  for began_s, ended_s in sorted(intervals):
    covered_s += max(0.0, ended_s - max(began_s, until_s))
    until_s = max(until_s, ended_s)
  return covered_s


def _summary(name: str, values: Sequence[float]) -> Iterator[tuple[str, float]]:
  yield f'{name}_sum', sum(values)
  yield f'{name}_count', len(values)
