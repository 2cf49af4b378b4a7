"""The figures of a run by class and by tenant, of requests that name one."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from pdjax.metrics.request_rows import NOBODY, RequestRows
from pdjax.metrics.stats import Stats, ratio
from pdjax.types.request import SLO

MOST_GROUPS = 100  # classes or tenants that are told apart: those with the most requests
NAMELESS = ''  # the name of those without one, where others have one


@dataclasses.dataclass(frozen=True, slots=True)
class GroupFigures:
  """The requests of one class or tenant in figures, each as `Report` has it of all.

  Attributes:
    num_prompts: Requests that arrived, each sample of one counted.
    completed: Requests that got all that they asked for.
    failed: The others.
    output_tokens: Tokens delivered.
    output_throughput: These per second of the run.
    request_goodput: Completed requests per second that met every latency limit; None without limits.
    goodput_share: Those requests as a share of all that arrived; None without limits.
    deadline_share: Requests that had ended well by their deadline, as a share of those that have one; None without.
    ttft: Time to first token.
    tpot: Time per output token after the first.
    e2el: End-to-end latency.
  """

  num_prompts: int
  completed: int
  failed: int
  output_tokens: int
  output_throughput: float | None
  request_goodput: float | None
  goodput_share: float | None
  deadline_share: float | None
  ttft: Stats
  tpot: Stats
  e2el: Stats

  def to_json(self) -> dict[str, Any]:
    """The figures as plain data, latencies by the keys that a report has for them."""
    figures = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    for name in ('ttft', 'tpot', 'e2el'):
      for field, value in dataclasses.asdict(figures.pop(name)).items():
        figures[f'{field.removesuffix("_ms")}_{name}_ms'] = value
    return figures


def by_class(requests: RequestRows, slo: SLO | None, duration_s: float) -> dict[str, GroupFigures]:
  """The groups by class, the first to arrive first; none if no request has one. Of very many, the largest."""
  return _grouped(requests, 'class_name', requests.class_names, slo, duration_s)


def by_tenant(requests: RequestRows, slo: SLO | None, duration_s: float) -> dict[str, GroupFigures]:
  """As `by_class`, by tenant."""
  return _grouped(requests, 'tenant', requests.tenants, slo, duration_s)


def deadline_share(requests: RequestRows, which: np.ndarray | None = None) -> float | None:
  """Requests that had ended well by their deadline, as a share of those that have one; None if none has.

  Args:
    requests: All of a run.
    which: Whether each counts, `[R]`; None counts all.
  """
  asked = ~np.isnan(requests.rows['deadline_s'])
  asked = asked if which is None else asked & which
  return ratio(int((requests.in_time & asked).sum()), int(asked.sum()))


def sizes(requests: RequestRows, field: str, names: Sequence[str]) -> dict[str, int]:
  """Requests of each class or tenant, as many of them as are told apart; none if no request has one."""
  if not len(names):
    return {}
  numbers, first, counts = np.unique(requests.rows[field], return_index=True, return_counts=True)
  largest = np.argsort(-counts, kind='stable')[:MOST_GROUPS]
  shown = largest[np.argsort(first[largest])]
  return {NAMELESS if numbers[i] == NOBODY else names[numbers[i]]: int(counts[i]) for i in shown.tolist()}


def members(requests: RequestRows, field: str, names: Sequence[str], name: str) -> np.ndarray:
  """Whether each request is of this class or tenant, `[R]`."""
  return requests.rows[field] == (NOBODY if name == NAMELESS else names.index(name))


def _grouped(
  requests: RequestRows, field: str, names: Sequence[str], slo: SLO | None, duration_s: float
) -> dict[str, GroupFigures]:
  found = sizes(requests, field, names)
  if not found:
    return {}
  has_limits = slo is not None or not (requests.rows['slo'] == NOBODY).all()
  meets = requests.meets(slo) if has_limits else None
  figures_s = {metric: getattr(requests, f'{metric}_s') for metric in ('ttft', 'tpot', 'e2el')}
  groups = {}
  for name, count in found.items():
    mine = members(requests, field, names, name)
    done = mine & requests.completed
    tokens = int(requests.rows['num_tokens'][done].sum())
    good = None if meets is None else int((meets & mine).sum())
    latencies = {metric: Stats.of_seconds(_known(values_s[done])) for metric, values_s in figures_s.items()}
    groups[name] = GroupFigures(
      num_prompts=count,
      completed=int(done.sum()),
      failed=count - int(done.sum()),
      output_tokens=tokens,
      output_throughput=ratio(tokens, duration_s),
      request_goodput=None if good is None else ratio(good, duration_s),
      goodput_share=None if good is None else ratio(good, count),
      deadline_share=deadline_share(requests, mine),
      **latencies,
    )
  return groups


def _known(values_s: np.ndarray) -> np.ndarray:
  return values_s[~np.isnan(values_s)]
