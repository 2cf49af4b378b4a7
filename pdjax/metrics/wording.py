"""Figures as people read them: numbers with their units, and a run in a few sentences."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from pdjax.metrics.groups import GroupFigures
from pdjax.metrics.numbers import number as number
from pdjax.metrics.numbers import percent as percent
from pdjax.metrics.numbers import plain as plain
from pdjax.metrics.numbers import short as short
from pdjax.metrics.report import Report
from pdjax.types.request import SLO


def per_second(rate: float) -> str:
  """Requests per second."""
  return f'{plain(rate)} req/s'


def listed(items: Sequence[str]) -> str:
  """Words in a row: 'a, b and c'."""
  return ' and '.join(filter(None, (', '.join(items[:-1]), items[-1])))


def byte_count(count: float) -> str:
  """Bytes in the largest unit that leaves a digit."""
  for unit in ('B', 'kB', 'MB', 'GB'):
    if count < 1000:
      return f'{count:.0f} B' if unit == 'B' else f'{count:.1f} {unit}'
    count /= 1000
  return f'{count:,.1f} TB'


def limits(slo: SLO | None) -> str:
  """Latency limits in words, empty without any."""
  if slo is None:
    return ''
  pairs = (('TTFT', slo.ttft_ms), ('TPOT', slo.tpot_ms), ('E2E', slo.e2el_ms))
  return ', '.join(f'{name} ≤ {plain(limit)} ms' for name, limit in pairs if limit is not None)


def totals(report: Report) -> Iterator[tuple[str, str]]:
  """Every figure of a run that is no latency, with its name."""
  yield 'request throughput', f'{number(report.request_throughput, 2)} req/s'
  if report.request_goodput is not None:
    yield 'request goodput', f'{number(report.request_goodput, 2)} req/s'
    yield 'within all limits', percent(report.goodput_share)
  if report.deadline_share is not None:
    yield 'within deadline', percent(report.deadline_share)
  yield 'output throughput', f'{number(report.output_throughput)} tok/s'
  yield 'total throughput', f'{number(report.total_token_throughput)} tok/s'
  yield 'input tokens', f'{report.total_input_tokens:,}'
  if report.caches or report.cached_tokens:
    yield 'cached tokens', _with_share(report.cached_tokens, report.total_input_tokens)
  for place, tokens in report.fetched_tokens().items():
    yield f'found at {place}', _with_share(tokens, report.begun_tokens)
  if unsent := report.hit_tokens('decode'):
    yield 'tokens not sent', _with_share(unsent, report.begun_tokens)
  yield 'output tokens', f'{report.total_output_tokens:,}'
  yield from report.bill.rows()
  yield 'wasted tokens', f'{report.wasted_tokens:,}'
  if report.num_preemptions:
    yield 'preemptions', f'{report.num_preemptions:,}, {report.recomputed_tokens:,} tokens computed anew'
  if report.role_changes:
    yield 'role changes', f'{len(report.role_changes):,}, from {report.split} to {report.last_split}'
  yield 'KV moved', byte_count(report.wire_bytes)
  yield 'transfers', f'{report.num_transfers:,}'
  for one in report.copies:
    yield f'{one.source} → {one.target}', f'{byte_count(one.bytes)} copied'
  if report.transfers.overlap_share is not None:
    yield 'wire time hidden', percent(report.transfers.overlap_share)
  yield 'host lag mean / p99', f'{number(report.host_lag.mean_ms, 2)} / {number(report.host_lag.p99_ms, 2)} ms'
  if report.warmup_s is not None:
    yield 'warm-up', f'{report.warmup_s:.1f} s'


def _with_share(count: int, whole: int) -> str:
  return f'{count:,}, {percent(count / whole)}' if whole else f'{count:,}'


def groups(report: Report) -> Iterator[tuple[str, Mapping[str, GroupFigures]]]:
  """The figures by class and by tenant, under 'class' and 'tenant', where there are several of them."""
  for what, found in (('class', report.by_class), ('tenant', report.by_tenant)):
    if len(found) > 1:
      yield what, {name or f'no {what}': group for name, group in found.items()}


def group_table(groups: Sequence[GroupFigures]) -> tuple[list[str], list[list[str]]]:
  """The figures of some groups as the head of a table and a row for each, without columns that tell nothing."""
  columns: dict[str, Callable[[GroupFigures], str]] = {'requests': lambda one: f'{one.num_prompts:,}'}
  if any(one.failed for one in groups):
    columns['failed'] = lambda one: f'{one.failed:,}'
  columns['TTFT p50/p99'] = lambda one: f'{short(one.ttft.p50_ms)}/{short(one.ttft.p99_ms)}'
  columns['TPOT p50/p99'] = lambda one: f'{short(one.tpot.p50_ms)}/{short(one.tpot.p99_ms)}'
  columns['tok/s'] = lambda one: short(one.output_throughput)
  if any(one.goodput_share is not None for one in groups):
    columns['limits'] = lambda one: percent(one.goodput_share)
  if any(one.deadline_share is not None for one in groups):
    columns['deadline'] = lambda one: percent(one.deadline_share)
  return list(columns), [[figure(one) for figure in columns.values()] for one in groups]


def headline(report: Report) -> str:
  """The system that ran and the number of its answers, in a sentence."""
  changing = ' at first, with roles that changed,' if report.role_changes else ''
  all_of = 'all ' if report.completed == report.num_prompts > 1 else f'{report.completed:,} of '
  return (
    f'{report.model_id or "The model"} on {report.split}{changing} answered {all_of}{report.num_prompts:,} '
    f'request{"" if report.num_prompts == 1 else "s"} in {short(report.duration_s)} s'
  )


def sentences(report: Report) -> Iterator[str]:
  """The latencies that users noticed and the cost of the hand-off, in sentences."""
  if report.ttft.p50_ms is None:
    yield 'Nothing was served.'
    return
  if report.completed >= 100:
    slow = f'one in a hundred took more than {short(report.ttft.p99_ms)} ms'
  else:
    requests = report.timeline.requests
    slow = f'the slowest took {short(float(np.nanmax(requests.ttft_s[requests.completed])) * 1e3)} ms'
  further = (
    '' if report.tpot.p50_ms is None else f'; each further token took {short(report.tpot.p50_ms)} ms in the median'
  )
  yield f'Half of the first tokens came within {short(report.ttft.p50_ms)} ms, {slow}{further}.'
  if report.num_transfers and report.handoff.mean_ms is not None:
    yield (
      f'Handing a request over from prefill to decode took {short(report.handoff.mean_ms)} ms on average, '
      f'{short(report.account.wire_ms)} ms of it on the wire.'
    )
  if report.goodput_share is not None:
    words = limits(report.slo)
    yield f'{percent(report.goodput_share)} of the requests were within their limits{f" ({words})" if words else ""}.'
