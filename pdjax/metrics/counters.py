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
| `vllm:prefix_cache_queries_total` | tokens of prompts of requests that were served |
| `vllm:prefix_cache_hits_total` | those of them that were cached, and so not computed |
| `pdjax:kv_copied_tokens_total` | tokens of cached blocks that were copied from place to place |
| `pdjax:kv_copied_bytes_total` | bytes of these |
| `pdjax:class_requests_total{class_name="..."}` | requests of a class, where any has one; `""` has those without |
| `pdjax:class_completed_total{class_name="..."}` | those of them that got all that they asked for |
| `pdjax:class_output_tokens_total{class_name="..."}` | tokens delivered to these |
| `pdjax:tenant_requests_total{tenant="..."}` | the same by tenant, and so `completed` and `output_tokens` |
| `sglang:kv_transfer_latency_ms` | milliseconds in which any of its pages were on the wire, a request |
| `sglang:kv_transfer_total_mb` | megabytes, a request |
| `sglang:kv_transfer_speed_gb_s` | gigabytes a second on the wire, a request |
| `sglang:num_transfer_failed_reqs_total` | requests with a transfer that did not end well |
| `pdjax:kv_transfer_queued_seconds` | seconds from the order to gathered, a transfer |
| `pdjax:kv_transfer_admitting_seconds` | seconds from arrived to written, a transfer |
| `pdjax:kv_transfer_hidden_seconds_total` | seconds on the wire while the source computed prompts |
"""

from collections.abc import Iterator, Sequence

import numpy as np

from pdjax.metrics.copies import copied_blocks
from pdjax.metrics.groups import members, sizes
from pdjax.metrics.request_rows import NOBODY, RequestRows
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
  rows = timeline.spans.rows[timeline.spans.is_transfer]
  rows = rows[rows['trip'] >= 0]
  trips = timeline.spans.trips[rows['trip']]
  began_s, ended_s = trips['wire_began_s'], trips['arrived_s']
  yield from _summary('vllm:nixl_bytes_transferred', rows['wire_bytes'])
  yield from _summary('vllm:nixl_num_descriptors', trips['pieces'])
  yield from _summary('vllm:nixl_xfer_time_seconds', ended_s - began_s)
  yield from _summary('vllm:nixl_post_time_seconds', began_s - rows['began_s'])
  yield 'vllm:nixl_num_failed_transfers_total', figures.failed
  yield 'vllm:num_preemptions_total', len(timeline.preemptions)
  served = timeline.requests.rows[timeline.requests.completed]
  yield 'vllm:prefix_cache_queries_total', int(served['prompt_len'][served['sample_of'] == NOBODY].sum())
  yield 'vllm:prefix_cache_hits_total', timeline.cached_tokens
  copies = copied_blocks(timeline.spans)
  yield 'pdjax:kv_copied_tokens_total', sum(one.tokens for one in copies)
  yield 'pdjax:kv_copied_bytes_total', sum(one.bytes for one in copies)
  requests, which = np.unique(timeline.spans.first_named(rows), return_inverse=True)
  latencies_s = _covered_s(which, began_s, ended_s, len(requests))
  sizes = np.bincount(which, rows['wire_bytes'], len(requests))
  yield from _summary('sglang:kv_transfer_latency_ms', 1e3 * latencies_s)
  yield from _summary('sglang:kv_transfer_total_mb', 1e-6 * sizes)
  yield from _summary('sglang:kv_transfer_speed_gb_s', 1e-9 * sizes[latencies_s > 0] / latencies_s[latencies_s > 0])
  yield 'sglang:num_transfer_failed_reqs_total', len(set(timeline.failed_transfers))
  yield from _summary('pdjax:kv_transfer_queued_seconds', rows['began_s'] - rows['submitted_s'])
  yield from _summary('pdjax:kv_transfer_admitting_seconds', rows['ended_s'] - ended_s)
  yield 'pdjax:kv_transfer_hidden_seconds_total', figures.hidden_s
  everyone = timeline.requests
  yield from _by_label(everyone, 'class', 'class_name', everyone.class_names)
  yield from _by_label(everyone, 'tenant', 'tenant', everyone.tenants)


def _by_label(requests: RequestRows, what: str, field: str, names: Sequence[str]) -> Iterator[tuple[str, float]]:
  """Counts of requests with a label for each class or tenant."""
  for name, count in sizes(requests, field, names).items():
    done = members(requests, field, names, name) & requests.completed
    label = f'{{{field}="{_escaped(name)}"}}'
    yield f'pdjax:{what}_requests_total{label}', count
    yield f'pdjax:{what}_completed_total{label}', int(done.sum())
    yield f'pdjax:{what}_output_tokens_total{label}', int(requests.rows['num_tokens'][done].sum())


def _escaped(label: str) -> str:
  return label.replace('\\', r'\\').replace('"', r'\"').replace('\n', r'\n')


def _covered_s(which: np.ndarray, began_s: np.ndarray, ended_s: np.ndarray, count: int) -> np.ndarray:
  """Seconds that lie in any of the intervals of each of so many requests; `which` is the one of an interval."""
  order = np.lexsort((ended_s, began_s, which))
  covered_s, owner, until_s = [0.0] * count, -1, 0.0
  for one, start_s, stop_s in zip(which[order].tolist(), began_s[order].tolist(), ended_s[order].tolist(), strict=True):
    until_s = until_s if one == owner else float('-inf')
    covered_s[one] += max(0.0, stop_s - max(start_s, until_s))
    owner, until_s = one, max(until_s, stop_s)
  return np.array(covered_s)


def _summary(name: str, values: np.ndarray) -> Iterator[tuple[str, float]]:
  yield f'{name}_sum', sum(values.tolist())
  yield f'{name}_count', len(values)
