"""Requests that come one after another, however long each takes."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

from pdjax.serving import ClusterState
from pdjax.types import Request
from pdjax.workload import Listed
from pdjax.workload.arrivals import ClosedLoop

GAP_S = 0.02  # in which a policy has seen that a request has ended, and something of it has begun its way elsewhere


class Turns(list[Request]):
  """Requests for a cluster of `tests.engine`, each of which comes when the one before it has ended."""


class Settled(ClosedLoop):
  """One request after another, each once all has arrived that the one before left elsewhere."""

  def __init__(self, requests: Iterable[Request], state: ClusterState):
    super().__init__(requests, 1, GAP_S)
    self._books = state.books
    self._quiet_s = 0.0  # nothing has been under way for a while by then

  def next_s(self) -> float:
    return math.inf if self._is_busy else max(super().next_s(), self._quiet_s)

  def due(self, now_s, finished=()):
    if self._is_busy:
      self._quiet_s = now_s + GAP_S
    return super().due(now_s if now_s >= self._quiet_s else -math.inf, finished)

  @property
  def _is_busy(self) -> bool:
    return bool(self._books.copies or self._books.in_flight)


class InTurns(Listed):
  """Groups of requests, each of which comes when all of those before it have ended."""

  def __init__(self, *groups: Sequence[Request], output_lens: Mapping[str, int] | None = None):
    super().__init__(groups[0], output_lens)
    self._groups, self._left = [*groups[1:]], len(groups[0])

  @property
  def closed(self) -> bool:
    return super().closed and not self._groups

  def due(self, now_s, finished=()):
    self._left -= len(finished)
    if not self._left and self._groups:
      group = self._groups.pop(0)
      self._left = len(group)
      for request in group:
        self._schedule(dataclasses.replace(request, arrival_s=now_s))
    return super().due(now_s)
