"""The holders of each page of one place, kind by kind, and a budget of bytes on their way out of it and into it."""

import array
from collections.abc import Callable, Iterable, Mapping, Sequence

from pdjax.types.pools import PoolSpecs, grown_pages
from pdjax.types.worker import WorkerSpec


class PageAllocator:
  """Hands out the pages `0 ... num_pages - 1`, counting how many hold each.

  A request holds its pages, and so does every transfer that has not ended: whichever lets go last frees them. A page
  that is cached keeps its content then, and may be held again, until no page without content is free: of those the
  oldest goes first.

  Attributes:
    num_pages: All pages.
    num_free: Pages that nobody holds.
    num_cached: Those of them that are cached.
    forget: Told the cached pages whose content is not to be found any more, as they are given to somebody else.
  """

  def __init__(self, num_pages: int):
    self.num_pages = self.num_free = num_pages
    self.num_cached = 0
    self.forget: Callable[[Sequence[int]], None] = lambda pages: None
    self._holders = [0] * num_pages
    self._is_cached = bytearray(num_pages)
    # Two lines, of pages without content and of cached ones, that nobody holds: arrays, as a dict takes ten times that.
    self._blank, self._kept = num_pages, num_pages + 1
    self._next = array.array('i', range(1, num_pages + 3))
    self._before = array.array('i', range(-1, num_pages + 1))
    self._link(num_pages - 1 if num_pages else self._blank, self._blank)
    self._link(self._blank, 0 if num_pages else self._blank)
    self._link(self._kept, self._kept)

  def _link(self, page: int, following: int) -> None:
    self._next[page], self._before[following] = following, page

  def _append(self, line: int, pages: Iterable[int]) -> None:
    following, before = self._next, self._before
    last = before[line]
    for page in pages:
      following[last], before[page] = page, last
      last = page
    following[last], before[line] = line, last

  def _remove(self, page: int) -> None:
    self._link(self._before[page], self._next[page])

  @property
  def holders(self) -> Sequence[int]:
    """The number of holders of each page."""
    return self._holders

  def is_cached(self, page: int) -> bool:
    """Whether a page has content that is found again."""
    return bool(self._is_cached[page])

  def free(self) -> list[int]:
    """The pages that nobody holds, the next to be taken first."""
    found = []
    for line in (self._blank, self._kept):
      page = self._next[line]
      while page != line:
        found.append(page)
        page = self._next[page]
    return found

  def take(self, count: int) -> tuple[int, ...]:
    """Take `count` free pages, the longest free first, cached ones last.

    Raises:
      ValueError: if fewer are free.
    """
    if count > self.num_free:
      raise ValueError(f'{count} pages wanted, {self.num_free} of {self.num_pages} free.')
    following, before, holders = self._next, self._before, self._holders
    num_kept = max(count - (self.num_free - self.num_cached), 0)
    pages: list[int] = []
    for line, some in ((self._blank, count - num_kept), (self._kept, num_kept)):
      page = following[line]
      for _ in range(some):
        pages.append(page)
        holders[page] = 1
        page = following[page]
      following[line], before[page] = page, line
    self.num_free -= count
    if num_kept:
      self.num_cached -= num_kept
      forgotten = pages[-num_kept:]
      for page in forgotten:
        self._is_cached[page] = 0
      self.forget(forgotten)
    return tuple(pages)

  def hold(self, pages: Iterable[int]) -> None:
    """Keep pages from being freed until a matching `drop`; a cached one that is free may be held."""
    holders = self._holders
    for page in pages:
      if not holders[page]:
        assert self._is_cached[page], f'page {page} is free and has no content'
        self._remove(page)
        self.num_free -= 1
        self.num_cached -= 1
      holders[page] += 1

  def drop(self, pages: Iterable[int]) -> None:
    """Let go of pages; those that nobody else holds become free."""
    holders, is_cached = self._holders, self._is_cached
    blank: list[int] = []
    kept: list[int] = []
    for page in pages:
      left = holders[page] - 1
      assert left >= 0, f'page {page} is free already'
      holders[page] = left
      if not left:
        (kept if is_cached[page] else blank).append(page)
    self._append(self._blank, blank)
    if kept:
      kept.reverse()  # what is behind others is of no use without them, so that it goes first
      self._append(self._kept, kept)
    self.num_free += len(blank) + len(kept)
    self.num_cached += len(kept)

  def cache(self, pages: Iterable[int]) -> None:
    """Note that pages which somebody holds have content that is found again."""
    for page in pages:
      assert self._holders[page], f'page {page} is held by nobody'
      self._is_cached[page] = 1

  def spoil(self, pages: Iterable[int]) -> None:
    """Note that the content of pages must not be found again, whoever holds them."""
    spoilt = [page for page in pages if self._is_cached[page]]
    free = [page for page in spoilt if not self._holders[page]]
    for page in spoilt:
      self._is_cached[page] = 0
    for page in free:
      self._remove(page)
    self._append(self._blank, free)
    self.num_cached -= len(free)
    if spoilt:
      self.forget(spoilt)

  def forget_all(self) -> None:
    """Let no page be cached any more."""
    kept = self.free()[self.num_free - self.num_cached :]
    self._append(self._blank, kept)
    self._link(self._kept, self._kept)
    self.num_cached = 0
    self._is_cached = bytearray(self.num_pages)


class PlacePages:
  """The pages of one place, of each cache kind, out of one memory of so many pages' bytes.

  A kind may have as many pages as that memory has room for by itself; one that grows with every token has as many as
  the tokens of all pages fill.
  """

  def __init__(self, pools: PoolSpecs, worker: WorkerSpec, changed: Callable[[], None] = lambda: None):
    """Begin with all pages of a worker free.

    Args:
      pools: Its cache kinds.
      worker: The worker, `num_pages` and page size filled in.
      changed: Told whenever pages are taken or freed.
    """
    assert isinstance(worker.num_pages, int)
    self.pools = pools
    self._changed = changed
    self._free: int | None = None  # bytes, where they are known
    self.num_pages = worker.num_pages
    self._num_bytes = worker.num_pages * pools.page_bytes
    self.by_kind: dict[str, PageAllocator] = {}
    for name, pool in pools.by_kind.items():
      grows = pool.kind.grows
      most = grown_pages(pool.kind, worker) if grows else self._num_bytes // pool.device_bytes
      self.by_kind[name] = PageAllocator(most)
    self._sized = {name: (one, pools.by_kind[name]) for name, one in self.by_kind.items()}

  @property
  def _free_bytes(self) -> int:
    if self._free is None:
      used = [(one.num_pages - one.num_free) * spec.device_bytes for one, spec in self._sized.values()]
      self._free = self._num_bytes - sum(used)
    return self._free

  def _note_change(self) -> None:
    self._free = None
    self._changed()

  @property
  def num_free(self) -> int:
    """Free memory in whole pages."""
    return self._free_bytes // self.pools.page_bytes

  @property
  def num_cached(self) -> int:
    """Free pages whose content is found again, of all kinds."""
    return sum([one.num_cached for one in self.by_kind.values()])

  @property
  def used_bytes(self) -> int:
    """Bytes of all pages that somebody holds, over all devices, copies counted once."""
    return sum((one.num_pages - one.num_free) * spec.page_bytes for one, spec in self._sized.values())

  @property
  def num_bytes(self) -> int:
    """Bytes of the whole memory over all devices, copies counted once, as far as pages of tokens fill it."""
    return self.num_pages * self.pools.whole_page_bytes

  def fits(self, needed: Mapping[str, int], beside: Mapping[str, int] | None = None) -> bool:
    """Whether so many pages of each kind are free, beside others that are as good as taken."""
    num_bytes = 0
    for name, count in needed.items():
      kind, spec = self._sized[name]
      if beside:
        count += beside[name]
      if count > kind.num_free:
        return False
      num_bytes += count * spec.device_bytes
    return num_bytes <= (self._free_bytes if self._free is None else self._free)

  @property
  def capacity(self) -> str:
    """Its pages in words, of each cache kind if there are several."""
    split = ', '.join(f'{name} {one.num_pages}' for name, one in self.by_kind.items())
    return f'{self.num_pages}{f" ({split})" if len(self.by_kind) > 1 else ""}'

  def could_fit(self, needed: Mapping[str, int]) -> bool:
    """Whether so many pages of each kind fit where nothing else is held."""
    for name, count in needed.items():
      if count > self.by_kind[name].num_pages:
        return False
    return self.pools.device_bytes(needed) <= self._num_bytes

  def take(self, needed: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Take so many free pages of each kind, the longest free first.

    Raises:
      ValueError: if fewer are free.
    """
    if not self.fits(needed):
      raise ValueError(f'{dict(needed)} pages wanted, {self.num_free} of {self.num_pages} free.')
    self._note_change()
    return {name: self.by_kind[name].take(count) for name, count in needed.items()}

  def hold(self, pages: Mapping[str, Iterable[int]]) -> None:
    """Keep pages of each kind from being freed until a matching `drop`; cached ones that are free may be held."""
    for name, numbers in pages.items():
      allocator = self.by_kind[name]
      free = allocator.num_free
      allocator.hold(numbers)
      if allocator.num_free != free:
        self._note_change()

  def drop(self, pages: Mapping[str, Iterable[int]]) -> None:
    """Let go of pages of each kind; those that nobody else holds become free."""
    for name, numbers in pages.items():
      self.by_kind[name].drop(numbers)
    self._note_change()


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
