"""A queue of requests in the order of a key that a policy names."""

import bisect
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

from pdjax.serving.requests import RequestState


class KeyedQueue(MutableMapping[str, RequestState]):
  """Requests by id, in the order of their keys; of equal ones, in that of arrival.

  Args:
    key: The key of an entry, worked out once when it is put in.
  """

  def __init__(self, key: Callable[[RequestState], Any]):
    self._key = key
    self._entries: dict[str, RequestState] = {}
    self._places: dict[str, tuple[Any, int]] = {}
    self._order: list[tuple[tuple[Any, int], str]] = []

  def __getitem__(self, name: str) -> RequestState:
    return self._entries[name]

  def __setitem__(self, name: str, entry: RequestState) -> None:
    self.pop(name, None)
    place = self._key(entry), entry.number
    bisect.insort(self._order, (place, name))
    self._entries[name], self._places[name] = entry, place

  def __delitem__(self, name: str) -> None:
    place = self._places.pop(name)
    del self._entries[name], self._order[bisect.bisect_left(self._order, (place, name))]

  def __iter__(self) -> Iterator[str]:
    return (name for _, name in self._order)

  def __len__(self) -> int:
    return len(self._order)
