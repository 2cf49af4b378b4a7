"""The part of the view that tells what is cached where, and between which places it may travel."""

import types
from collections.abc import Mapping

from pdjax.serving.blocks import Blocks
from pdjax.serving.books import Books
from pdjax.serving.seen import RequestView, WorkerView


class CachedView:
  """The places of a cluster, and what they hold of requests; see `ClusterView`."""

  def __init__(self, books: Books):
    """Look at these books."""
    self._books = books
    self._workers: Mapping[str, WorkerView] = types.MappingProxyType(books.workers)
    self._places: Mapping[str, WorkerView] = types.MappingProxyType(books.places)
    self._ended: Mapping[str, RequestView] = types.MappingProxyType(books.ended)

  @property
  def places(self) -> Mapping[str, WorkerView]:
    """Each place by name: the workers, and behind them those that only hold pages (`ServingConfig.places`)."""
    return self._places

  @property
  def ended(self) -> Mapping[str, RequestView]:
    """Requests that were served to their end in this turn and left blocks where they were; none without a cache.

    One is here until a copy of its blocks was asked for, or the turn ends.
    """
    return self._ended

  def cached_tokens(self, request: str, worker: str, source: str | None = None) -> int:
    """Tokens at the beginning of a request that a worker holds; its first chunk may start behind them.

    A chunk that starts further on starts at what is cached, with as many tokens: others may have taken some of the
    pages since a policy looked.

    Args:
      request: The request.
      worker: The worker.
      source: The worker that prefills it, where it is another.

    Raises:
      KeyError: if there is no such request or worker.
    """
    prefixes, entry = self._books.prefixes, self._books.requests.get(request)
    if entry is None or worker not in self._workers or (source is not None and source not in self._workers):
      known = 'an unfinished request' if entry is None else f'workers, which are {", ".join(self._workers)}'
      raise KeyError(f'cached_tokens({request!r:.80}, {worker!r:.80}, {source!r:.80}), expected the name of {known}.')
    return 0 if prefixes is None else prefixes.hit(entry, worker, source)

  def fetchable_tokens(self, request: str, place: str, worker: str) -> int:
    """Tokens at the beginning of a request that a worker could begin behind, were they copied to it from a place.

    Raises:
      KeyError: if there is no such request, place or worker.
    """
    prefixes, entry = self._books.prefixes, self._books.requests.get(request)
    if entry is None or place not in self._places or worker not in self._workers:
      raise KeyError(
        f'fetchable_tokens({request!r:.80}, {place!r:.80}, {worker!r:.80}), expected the names of an unfinished '
        f'request, a place and a worker, of {", ".join(self._places)}.'
      )
    return 0 if prefixes is None or not self.has_way(place, worker) else prefixes.fetchable(entry, place, worker)

  def blocks(self, request: str | RequestView) -> Blocks:
    """The blocks of a request that is unfinished, or has `ended`, by which `Transfer` copies what a place holds of it.

    They are those of its prompt and of what it has generated, whoever holds them.

    Args:
      request: Its id, or the request itself; of an id that two have, the unfinished one is meant.

    Raises:
      KeyError: if there is no such request, or nothing is cached.
    """
    books = self._books
    name = request if isinstance(request, str) else request.request.id
    known = [one for one in (books.requests.get(name), books.ended.get(name)) if one is not None]
    entry = next((one for one in known if isinstance(request, str) or one is request), None)
    if entry is None or books.prefixes is None:
      what = 'a request that is unfinished or has ended in this turn' if entry is None else 'a config with prefix_cache'
      raise KeyError(f'blocks({name!r:.80}), expected {what}.')
    return books.prefixes.making.blocks(entry)

  def has_way(self, source: str, target: str) -> bool:
    """Whether pages may travel from one place to another."""
    return (source, target) in self._books.ways

  @property
  def caches(self) -> bool:
    """Whether prefixes are kept (`ServingConfig.prefix_cache`)."""
    return self._books.prefixes is not None

  def may_be_cached(self, tokens: int) -> bool:
    """Whether so many tokens of a beginning may be found: prefixes are kept, and they are whole blocks."""
    prefixes = self._books.prefixes
    return prefixes is not None and tokens >= 0 and tokens % prefixes.block_tokens == 0
