"""Laws that the books keep from turn to turn, looked at as a whole: for tests, and for whoever doubts a result."""

from collections import Counter

import numpy as np

from pdjax.serving.books import Books
from pdjax.serving.prefixes import Prefixes


def check(books: Books) -> None:
  """Look at every page of every place.

  Pages are conserved, each has as many holders as there are requests and transfers that name it, the index points at
  pages that are cached and these at it, and no two tenants hold one page.

  Raises:
    AssertionError: if that is not so; the message names the place and the pages.
  """
  holders = _holders(books)
  for worker, holdings in books.holdings.items():
    for kind, place in holdings.pages.by_kind.items():
      found = np.zeros(place.num_pages, np.int64)
      for page, count in holders.get((worker, kind), Counter()).items():
        found[page] = count
      wrong = np.flatnonzero(found != np.array(place.holders)).tolist()
      assert not wrong, (
        f'{worker}, {kind}: pages {wrong} have {found[wrong]} holders and {np.array(place.holders)[wrong]}'
      )
      free = place.free()
      assert len(free) == len({*free}) == place.num_free, f'{worker}, {kind}: free pages are counted wrongly'
      assert sorted(free) == np.flatnonzero(found == 0).tolist(), f'{worker}, {kind}: a page is lost'
      kept = [page for page in free if place.is_cached(page)]
      assert kept == free[len(free) - place.num_cached :], f'{worker}, {kind}: cached pages are not those last in line'
  _check_tenants(books)
  if books.prefixes is not None:
    _check_index(books, books.prefixes)


def _holders(books: Books) -> dict[tuple[str, str], Counter[int]]:
  """The number of holders of each page, by worker and cache kind."""
  found: dict[tuple[str, str], Counter[int]] = {}
  for entry in books.requests.values():
    for worker, pages in entry.pages.items():
      for kind, numbers in pages.items():
        found.setdefault((worker, kind), Counter()).update(numbers)
    for kind, pairs in entry.copies.items():
      assert entry.target is not None
      found.setdefault((entry.target, kind), Counter()).update(source for source, _ in pairs)
  for copy in books.copies.values():
    assert books.prefixes is not None
    kind = books.prefixes.kind
    found.setdefault((copy.source, kind), Counter()).update(copy.plan.source_pages)
    found.setdefault((copy.target, kind), Counter()).update((*copy.plan.before, *copy.pages))
  for order in books.transfers.orders_under_way():
    span = order.span
    found.setdefault((order.source, span.kind), Counter()).update(span.source_pages)
    found.setdefault((order.target, span.kind), Counter()).update(span.target_pages)
  return found


def _check_tenants(books: Books) -> None:
  held = [
    (worker, kind, numbers, entry.request.salt)
    for entry in books.requests.values()
    for worker, pages in entry.pages.items()
    for kind, numbers in pages.items()
  ]
  for copy in books.copies.values():
    assert books.prefixes is not None
    kind, salt = books.prefixes.kind, copy.blocks.salt
    held.append((copy.source, kind, copy.plan.source_pages, salt))
    held.append((copy.target, kind, (*copy.plan.before, *copy.pages), salt))
  salts: dict[tuple[str, str, int], str] = {}
  for place, kind, numbers, salt in held:
    for page in numbers:
      first = salts.setdefault((place, kind, page), salt)
      assert first == salt, f'{place}, {kind}: page {page} is held for {first!r} and another tenant'


def _check_index(books: Books, prefixes: Prefixes) -> None:
  for worker, holdings in books.holdings.items():
    place = holdings.pages.by_kind[prefixes.kind]
    pages = prefixes.index.check(worker)
    cached = {page for page in range(place.num_pages) if place.is_cached(page)}
    assert pages <= cached, f'{worker}: the index points at pages {sorted(pages - cached)}, which are not cached'
    assert cached <= pages, f'{worker}: pages {sorted(cached - pages)} are cached, and the index has nothing of them'
