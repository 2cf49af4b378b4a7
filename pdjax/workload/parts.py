"""Workloads as parts of a greater one: each in its own time, with ids, seeds and prompts of its own."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np

from pdjax.serving.events import Arrived, Finished, Withdrawn
from pdjax.serving.loop import Arrivals
from pdjax.types.fitting import Remedy
from pdjax.types.request import Request
from pdjax.workload.tokens import BlockTokens, RandomTokens
from pdjax.workload.workload import Workload

AnyWorkload = Annotated[Workload, Remedy('ready requests are Given(requests)')]
_GOLDEN = 0x9E3779B97F4A7C15  # odd, so that different ids stay different


class Placed:
  """A source as a part of a greater one: it begins at its own time, and the ids of its requests with a prefix.

  The source lives in its own time, from 0 on, and hears only of its own requests.

  Args:
    source: The source.
    prefix: The beginning of the ids and sessions of its requests, which no other part has.
    fields: Further fields of all of its requests.
    start_s: The time at which it begins.
    seconds: The seconds that it lasts: what would come later does not come.
    number: The number of the part, by which drawn prompts and ids of blocks are kept apart from those of others; 0
      leaves them as they are.
  """

  def __init__(
    self,
    source: Arrivals,
    prefix: str,
    fields: Mapping[str, Any] | None = None,
    *,
    start_s: float = 0.0,
    seconds: float = math.inf,
    number: int = 0,
  ):
    self._source = source
    self._prefix = prefix
    self._fields = dict(fields or {})
    self._start_s = start_s
    self._seconds = seconds
    self._number = number
    self._source_s = 0.0  # up to which it was asked
    self._is_over = False
    self._open: set[str] = set()  # samples that have not ended, under the names that the source knows

  @property
  def closed(self) -> bool:
    """Whether nothing comes any more: a request without an end may yet be followed by another."""
    return self._source.closed or self._is_over or (not self._open and self._source.next_s() >= self._seconds)

  def next_s(self) -> float:
    source_s = self._source.next_s()
    return source_s + self._start_s if source_s < self._seconds else math.inf

  def due(self, now_s: float, finished: Sequence[Finished] = ()) -> list[Arrived | Withdrawn]:
    events: list[Arrived | Withdrawn] = []
    if ends := [self._own(end) for end in finished if end.request.startswith(self._prefix)]:
      self._open.difference_update(end.request for end in ends)
      events += self._source.due(self._source_s, ends)
    # Sums are compared, as `next_s` has them: a difference may be rounded to a time at which nothing is due yet.
    while (source_s := self._source.next_s()) < self._seconds and source_s + self._start_s <= now_s:
      self._source_s = max(self._source_s, source_s)
      events += self._source.due(source_s, ())
    self._is_over = now_s >= self._start_s + self._seconds
    return [self._named(event) for event in events]

  def output_len(self, request_id: str) -> int | None:
    if not request_id.startswith(self._prefix):
      return None
    return self._source.output_len(request_id.removeprefix(self._prefix))

  def _own(self, end: Finished) -> Finished:
    """The end as the source knows it."""
    name, now_s = end.request.removeprefix(self._prefix), max(end.now_s - self._start_s, 0.0)
    return dataclasses.replace(end, request=name, now_s=now_s)

  def _named(self, event: Arrived | Withdrawn) -> Arrived | Withdrawn:
    if isinstance(event, Withdrawn):
      return Withdrawn(self._prefix + event.request)
    request = event.request
    self._open.update(sample.id for sample in request.samples())
    fields = self._fields | _apart(request, self._number)
    if request.session is not None:
      fields['session'] = self._prefix + request.session
    if request.sample_of is not None:
      fields['sample_of'] = self._prefix + request.sample_of
    arrival_s = request.arrival_s + self._start_s
    return Arrived(dataclasses.replace(request, id=self._prefix + request.id, arrival_s=arrival_s, **fields))


class Merged:
  """Several sources as one; no two may have requests of one id."""

  def __init__(self, sources: Sequence[Arrivals]):
    self._sources = tuple(sources)

  @property
  def closed(self) -> bool:
    return all(source.closed for source in self._sources)

  def next_s(self) -> float:
    return min(source.next_s() for source in self._sources)

  def due(self, now_s: float, finished: Sequence[Finished] = ()) -> list[Arrived | Withdrawn]:
    events = [event for source in self._sources for event in source.due(now_s, finished)]
    return sorted(events, key=lambda event: event.request.arrival_s if isinstance(event, Arrived) else now_s)

  def output_len(self, request_id: str) -> int | None:
    lengths = (source.output_len(request_id) for source in self._sources)
    return next((length for length in lengths if length is not None), None)


def has_field(workload: Any, name: str) -> bool:
  """Whether a workload is a dataclass with a field of this name."""
  return dataclasses.is_dataclass(workload) and any(one.name == name for one in dataclasses.fields(workload))


def with_fields(workload: Any, **fields: Any) -> Any:
  """A copy of a workload, which is a dataclass, with fields replaced."""
  return dataclasses.replace(workload, **fields)


def with_own_seed(workload: Workload, seed: int, number: int) -> Any:
  """The workload with a seed made of its own, that of the whole and its number; as it is, if it draws nothing."""
  if workload.seed is None or not has_field(workload, 'seed'):
    return workload
  words = np.random.SeedSequence((seed, workload.seed, number)).generate_state(1, np.uint64)
  return with_fields(workload, seed=int(words[0] >> np.uint64(1)))  # below 2**63


def repeats(workloads: Sequence[Workload]) -> bool:
  """Whether prompts of any of some workloads may begin alike."""
  return any(getattr(workload, 'repeats', True) for workload in workloads)


def _apart(request: Request, number: int) -> dict[str, Any]:
  """Fields of a request by which its drawn tokens are none of another part's, however it drew them."""
  if not number:
    return {}
  fields: dict[str, Any] = {}
  if request.block_hashes:
    fields['block_hashes'] = _moved(request.block_hashes, number)
  if isinstance(request.prompt, RandomTokens):
    fields['prompt'] = dataclasses.replace(request.prompt, seed=_moved((request.prompt.seed,), number)[0])
  elif isinstance(request.prompt, BlockTokens):
    seeds, hashes = _moved((request.prompt.seed,), number), _moved(request.prompt.block_hashes, number)
    fields['prompt'] = dataclasses.replace(request.prompt, seed=seeds[0], block_hashes=hashes)
  return fields


def _moved(ids: Sequence[int], number: int) -> tuple[int, ...]:
  step = number * _GOLDEN
  return tuple((one + step) % 2**64 for one in ids)
