"""Requests that come one after another, however long each takes."""

import dataclasses
from collections.abc import Mapping, Sequence

from pdjax.types import Request
from pdjax.workload import Listed

GAP_S = 0.05  # from the end of a request to the next, in which blocks arrive that it leaves elsewhere


class Turns(list[Request]):
  """Requests for a cluster of `tests.engine`, each of which comes when the one before it has ended."""


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
