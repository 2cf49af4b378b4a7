"""Growth: pages for what a sequence generates, taken as it grows, and who waits for some."""

from pdjax.serving.books import Books
from pdjax.serving.requests import RequestState


def grow(books: Books) -> None:
  """Give sequences pages where some were freed, or tokens came: the oldest first.

  First each gets what its next token needs, then the pages that it takes ahead. What there are no pages for is noted as
  wanted, so that nothing new takes it.
  """
  for worker in books.growing:
    holdings = books.holdings[worker]
    holdings.wanted = {}
    growing = [entry for entry in holdings.decoding.values() if entry.pages_ahead is not None and entry.tokens_left > 0]
    growing.sort(key=lambda entry: entry.number)
    for entry in growing:
      if not entry.can_step:
        _take(books, worker, entry, holdings.pages.pools.pages_for(entry.next_tokens))
    for entry in growing:
      lacking = _take(books, worker, entry, entry.pages_ahead_of(holdings.pages.pools, entry.next_tokens))
      for kind, count in lacking.items():
        holdings.wanted[kind] = holdings.wanted.get(kind, 0) + count
  books.growing.clear()


def _take(books: Books, worker: str, entry: RequestState, needed: dict[str, int]) -> dict[str, int]:
  """Take what a sequence lacks of these pages of each kind, if all of it is free; else what it lacks."""
  place, held = books.holdings[worker].pages, entry.pages[worker]
  lacking = {kind: count - len(held[kind]) for kind, count in needed.items() if count > len(held[kind])}
  if not lacking or not place.fits(lacking):
    return lacking
  new = place.take(lacking)
  for kind, numbers in new.items():
    first, before = entry.growth.get(kind, (len(held[kind]), ()))
    entry.growth[kind] = first, (*before, *numbers)
  books.holdings[worker].batch.note_growth(entry)
  books.settle_pages(entry, worker, {kind: (*numbers, *new.get(kind, ())) for kind, numbers in held.items()})
  return {}
