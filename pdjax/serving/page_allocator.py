"""The holders of each page of one place, and a budget of bytes on their way out of it and into it."""

from collections import deque
from collections.abc import Iterable


class PageAllocator:
  """Hands out the pages `0 ... num_pages - 1`, counting how many hold each.

  A request holds its pages, and so does every transfer that has not ended: whichever lets go last frees them.
  """

  def __init__(self, num_pages: int):
    self.num_pages = num_pages
    self._free = deque(range(num_pages))
    self._holders = [0] * num_pages

  @property
  def num_free(self) -> int:
    """Pages that nobody holds."""
    return len(self._free)

  def take(self, count: int) -> tuple[int, ...]:
    """Take `count` free pages, the longest free first.

    Raises:
      ValueError: if fewer are free.
    """
    if count > len(self._free):
      raise ValueError(f'{count} pages wanted, {len(self._free)} of {self.num_pages} free.')
    pages = tuple(self._free.popleft() for _ in range(count))
    self.hold(pages)
    return pages

  def hold(self, pages: Iterable[int]) -> None:
    """Keep pages from being freed until a matching `drop`."""
    for page in pages:
      self._holders[page] += 1

  def drop(self, pages: Iterable[int]) -> None:
    """Let go of pages; those that nobody else holds become free."""
    for page in pages:
      assert self._holders[page] > 0, f'page {page} is free already'
      self._holders[page] -= 1
      if self._holders[page] == 0:
        self._free.append(page)


class Staging:
  """A budget of bytes for what is on its way: gathered on one side, not yet written on the other."""

  def __init__(self, num_bytes: int):
    self.num_bytes = num_bytes
    self.free_bytes = num_bytes

  def take(self, num_bytes: int) -> None:
    """Count bytes as taken."""
    assert 0 <= num_bytes <= self.free_bytes, f'{num_bytes} bytes wanted, {self.free_bytes} free'
    self.free_bytes -= num_bytes

  def give_back(self, num_bytes: int) -> None:
    """Count bytes as free again."""
    self.free_bytes += num_bytes
    assert self.free_bytes <= self.num_bytes, 'more bytes came back than were taken'
