"""The hits of the prefix cache: one by one as `PrefixHit`, and all together as arrays."""

from collections.abc import Mapping, Sequence

import numpy as np

from pdjax.metrics.columns import Column, Read, numbered
from pdjax.serving.events import HitSide, PrefixHit

SIDES: tuple[HitSide, ...] = ('prefill', 'decode')
_DTYPE = np.dtype([('now_s', 'f8'), ('request', 'i4'), ('place', 'i2'), ('tokens', 'i4'), ('side', 'i1')])


class HitRows(Read[PrefixHit]):
  """The hits of a run in order, each made as it is read.

  Args:
    rows: `[N]`, a row each; requests, places and sides are numbers.
    requests: The ids of the requests.
    places: The names of the places.
  """

  def __init__(self, rows: np.ndarray | None = None, requests: Sequence[str] = (), places: Sequence[str] = ()):
    self.rows = np.empty(0, _DTYPE) if rows is None else rows
    self.places = places
    self._requests = requests

  def __len__(self) -> int:
    return len(self.rows)

  def made(self, number: int) -> PrefixHit:
    """The one of a number, in their order."""
    now_s, request, place, tokens, side = self.rows[number].item()
    return PrefixHit(now_s, self._requests[request], self.places[place], tokens, SIDES[side])

  def on(self, side: HitSide) -> np.ndarray:
    """The rows of one side."""
    return self.rows[self.rows['side'] == SIDES.index(side)]

  def tokens(self) -> Mapping[HitSide, Mapping[str, int]]:
    """Tokens found, by side and place; sides and places without a hit are left out."""
    found: dict[HitSide, dict[str, int]] = {}
    for side in SIDES:
      rows = self.on(side)
      sums = np.bincount(rows['place'], rows['tokens'], len(self.places)).astype(np.int64).tolist()
      if some := {place: count for place, count in zip(self.places, sums, strict=True) if count}:
        found[side] = some
    return found

  @property
  def nbytes(self) -> int:
    """Bytes of the array."""
    return self.rows.nbytes


class HitColumns:
  """The hits as they come, in an array.

  Args:
    requests: The numbers of requests by id; each has one by the time that it finds something.
  """

  def __init__(self, requests: Mapping[str, int]):
    self._requests = requests
    self._places: dict[str, int] = {}
    self._rows = Column(_DTYPE)

  def add(self, hit: PrefixHit) -> None:
    """Add a hit."""
    place = numbered(self._places, hit.place)
    self._rows.append((hit.now_s, self._requests[hit.request], place, hit.tokens, SIDES.index(hit.side)))

  def rows(self, requests: Sequence[str]) -> HitRows:
    """All of them so far."""
    return HitRows(self._rows.array, requests, list(self._places))
