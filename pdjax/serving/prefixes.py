"""Cached prefixes: what places hold of the beginning of a prompt, and what becomes of the pages of those that end."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from pdjax.serving.block_keys import KEY_BYTES, NO_PARENT
from pdjax.serving.block_making import BlockMaking
from pdjax.serving.blocks import Blocks, Made
from pdjax.serving.events import AllBlocksCleared, BlockRemoved, BlockStored, Event
from pdjax.serving.page_allocator import PlacePages
from pdjax.serving.prefix_index import PrefixIndex
from pdjax.serving.requests import RequestState
from pdjax.types.model import ModelSpec
from pdjax.types.prefix_cache import PrefixCache
from pdjax.types.worker import WorkerSpec


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
  """The beginning of a request that a place holds.

  Attributes:
    tokens: The tokens of it.
    pages: Their pages, which are held; that of a page with only its beginning in common is the last.
  """

  tokens: int = 0
  pages: tuple[int, ...] = ()


NOTHING = Found()


@dataclasses.dataclass(frozen=True, slots=True)
class CopyPlan:
  """Blocks that a place has and another lacks.

  Attributes:
    keys: The keys of all blocks of the sequence, as they are made at the target.
    made: The way in which they are made there.
    start: The first token that the target lacks, or of the page with its first: of a page of the target.
    have: Tokens that the target has.
    end: The token behind the last that travels.
    source_pages: The pages of the source that hold these tokens.
    before: The pages of the target that hold what is before them, or some of them.
  """

  keys: bytes
  made: Made
  start: int
  have: int
  end: int
  source_pages: tuple[int, ...]
  before: tuple[int, ...]


_NO_BLOCKS = np.zeros(0, np.int32)


class Prefixes:
  """Finds the pages that a place holds of a sequence, and notes those that are filled.

  A place takes only blocks that the same request would have brought it without a cache: made with the weights of the
  worker that prefills it, and gone through the same dtypes on the way. What decode made counts for a prompt where that
  is the same.

  Attributes:
    index: The blocks of all places.
    making: The ways in which blocks are made.
    page_tokens: Tokens per page, by place.
    kind: The cache kind that is kept.
    block_tokens: Tokens of a block.
  """

  def __init__(
    self,
    model: ModelSpec,
    settings: PrefixCache,
    places: Mapping[str, WorkerSpec],
    pages: Mapping[str, PlacePages],
    now_s: Callable[[], float],
    told: list[Event],
  ):
    """Begin with nothing cached.

    Args:
      model: The model served.
      settings: The settings.
      places: Each place, its page size filled in.
      pages: The pages of each.
      now_s: Tells the time of the turn.
      told: Gets an event for what is stored or forgotten.

    Raises:
      ValueError: if the model has other caches than one of all tokens, or a page is not made of whole blocks.
    """
    kinds = ', '.join(f'{kind.name!r} of {"all tokens" if kind.grows else kind.reach}' for kind in model.cache)
    if len(model.cache) != 1 or not model.cache[0].grows:
      raise ValueError(
        f'prefix_cache is set, but {model.name} caches {kinds}, expected one kind that keeps all tokens; leave '
        'prefix_cache out.'
      )
    (kind,) = model.cache
    self.kind = kind.name
    self._pages = pages
    self._now_s = now_s
    self._told = told
    self.page_tokens: dict[str, int] = {}
    sizes = {}
    for name, worker in places.items():
      assert worker.page_size is not None
      self.page_tokens[name] = size = kind.entries_per_page(worker.page_size)
      if size % settings.block_tokens:
        raise ValueError(
          f'prefix_cache.block_tokens is {settings.block_tokens}, which does not divide the page size of worker '
          f'{name!r}, {size}; set it to a number that divides every page size.'
        )
      sizes[name] = pages[name].by_kind[kind.name].num_pages, size // settings.block_tokens
    self.index = PrefixIndex(sizes)
    self.making = BlockMaking(model, settings, places)
    self.block_tokens = settings.block_tokens
    self._logs_tokens = settings.log_tokens
    self._prefills = {name: place.ever_prefills for name, place in places.items()}
    self._chains: dict[str, dict[Made, None]] = {name: {} for name in places}  # the ways in which blocks there are made
    self._version = 0  # counts the changes of the index
    for name, place in pages.items():
      place.by_kind[kind.name].forget = functools.partial(self._forget, name)

  def _forget(self, worker: str, pages: Sequence[int]) -> None:
    if keys := self.index.forget_pages(worker, pages):
      self._told.append(BlockRemoved(self._now_s(), worker, keys))
    self._version += 1

  # -------------------------------------------------------------------------- hits

  def hit(self, entry: RequestState, worker: str, source: str | None = None) -> int:
    """Tokens of a request's beginning that a worker holds: in whole blocks where it computes the prompt, else in pages.

    Args:
      entry: The request.
      worker: The worker.
      source: The worker that computes the prompt; None for the same, which has to compute a token at least.
    """
    if not entry.is_cached or not self.index.num_blocks(worker):
      return 0
    version, tokens = entry.hits.get((worker, source), (-1, 0))
    if version != self._version:
      is_computed_here = source is None or source == worker
      most = entry.prefill_len - is_computed_here
      found = self._find(entry, self.making.made_of(source or worker, worker))[: most // self.block_tokens]
      tokens = self.index.hit(worker, found) * self.block_tokens
      if not is_computed_here:
        tokens -= tokens % self.page_tokens[worker]
      entry.hits[worker, source] = self._version, tokens
    return tokens

  def shared_pages(self, entry: RequestState, worker: str, most: int) -> int:
    """Whole pages of a request's beginning, in so many tokens, that a worker has and others hold.

    None where it depends on who computes the prompt.
    """
    if not entry.is_cached or not self.index.num_blocks(worker):
      return 0
    made = self.making.asked_of(worker)
    if len(made) != 1:
      return 0
    size = self.page_tokens[worker]
    found = self._find(entry, *made)[: min(most, entry.prefill_len - 1) // self.block_tokens]
    tokens = self.index.hit(worker, found) * self.block_tokens // size * size
    holders = self._pages[worker].by_kind[self.kind].holders
    return sum(1 for page in self.index.pages(worker, found[: tokens // self.block_tokens]) if holders[page])

  def _find(self, entry: RequestState, made: Made) -> np.ndarray:
    """The blocks of a request's beginning that some place holds, looked up once until the index changes."""
    version, found = entry.found.get(made, (-1, _NO_BLOCKS))
    if version != self._version:
      found = self.index.find(self.making.keys(entry, made))
      entry.found[made] = self._version, found
    return found

  def hold(self, entry: RequestState, worker: str, most: int, source: str | None = None) -> Found:
    """Hold the whole pages that a worker has of a request's beginning, of at most so many tokens.

    Args:
      entry: The request.
      worker: The worker.
      most: The tokens.
      source: The worker that computes the prompt, where it is another.
    """
    tokens = min(self.hit(entry, worker, source), most)
    tokens -= tokens % self.page_tokens[worker]
    if not tokens:
      return NOTHING
    pages = self._pages_of(entry, worker, source, tokens)
    self._pages[worker].hold({self.kind: pages})
    entry.stored[worker] = tokens // self.block_tokens
    return Found(tokens, pages)

  def hold_part(self, entry: RequestState, worker: str, found: Found, most: int, spare: int) -> Found:
    """Hold the page behind those that were found too, of which only the beginning is in common, until it is copied.

    Args:
      entry: The request, which the worker computes.
      worker: The worker.
      found: The whole pages, which are held.
      most: Tokens that are to be found in all, at most.
      spare: Pages that nobody needs meanwhile; without any, only a page that others hold will do.
    """
    tokens = min(self.hit(entry, worker), most, found.tokens + self.page_tokens[worker] - 1)
    tokens -= tokens % self.block_tokens
    if tokens <= found.tokens:
      return found
    *_, page = self._pages_of(entry, worker, None, tokens)
    if spare < 1 and not self._pages[worker].by_kind[self.kind].holders[page]:
      return found
    self._pages[worker].hold({self.kind: (page,)})
    entry.stored[worker] = tokens // self.block_tokens
    return Found(tokens, (*found.pages, page))

  def _pages_of(self, entry: RequestState, worker: str, source: str | None, tokens: int) -> tuple[int, ...]:
    found = self._find(entry, self.making.made_of(source or worker, worker))
    return self.index.pages(worker, found[: tokens // self.block_tokens])

  # -------------------------------------------------------------------------- what is filled

  def note_computed(self, entry: RequestState, worker: str, source: str, tokens: int) -> None:
    """Note that a worker holds so many tokens of what a request has computed before it decodes.

    Args:
      entry: The request.
      worker: The worker.
      source: The worker that computed them; the same, or the one that sent them.
      tokens: The number of them.
    """
    if entry.is_cached:
      made = self.making.made_of(source, worker)
      keys = self.making.keys(entry, made)
      self._store(entry, worker, made, keys[: tokens // self.block_tokens * KEY_BYTES])

  def note_decoded(self, entry: RequestState, worker: str, source: str) -> None:
    """Note what a request leaves behind where it decoded: the tokens that it generated but the last.

    Not where a prompt with these tokens would be made in another way.
    """
    made = self.making.made_of(source, worker)
    if entry.is_cached and made == self.making.made_of(worker, worker):
      self._store(entry, worker, made, self.making.decoded_keys(entry, made))

  def _store(self, entry: RequestState, worker: str, made: Made, keys: bytes) -> None:
    """Note that the pages of a request hold the blocks of these keys."""
    first = entry.stored.get(worker, 0)
    if len(keys) > first * KEY_BYTES:
      entry.stored[worker] = len(keys) // KEY_BYTES
      blocks = functools.partial(self.making.blocks, entry)
      self._enter(worker, made, keys, entry.pages[worker][self.kind], 0, first, blocks)

  def _enter(
    self,
    place: str,
    made: Made,
    keys: bytes,
    pages: Sequence[int],
    first_page: int,
    first: int,
    blocks: Callable[[], Blocks],
  ) -> None:
    """Note that a place holds the blocks of these keys.

    Args:
      place: The place.
      made: The way in which they are made there.
      keys: The keys of the sequence from its first block on.
      pages: Its pages there, from page `first_page` of the sequence on.
      first_page: The first of these.
      first: The first block that is to be noted.
      blocks: Makes the blocks themselves, for the log.
    """
    per_page = self.page_tokens[place] // self.block_tokens
    behind = pages[first // per_page - first_page :]
    new = self.index.store(place, keys[first * KEY_BYTES :], behind, first % per_page)
    if new.any():
      self._chains[place][made] = None
      stored = np.flatnonzero(new) + first
      at = stored // per_page - first // per_page
      self._pages[place].by_kind[self.kind].cache({behind[one] for one in at.tolist()})
      self._version += 1
      self._tell(place, keys, stored, self.making.tokens_of(blocks()) if self._logs_tokens else ())

  def _tell(self, place: str, keys: bytes, stored: np.ndarray, tokens: tuple[int, ...]) -> None:
    """Tell of the blocks of a sequence that are new at a place, an event for each run of them."""
    size = self.block_tokens
    is_one_run = stored[-1] - stored[0] == len(stored) - 1  # mostly; `np.split` takes as long as all the rest
    for run in [stored] if is_one_run else np.split(stored, np.flatnonzero(np.diff(stored) > 1) + 1):
      start, stop = int(run[0]), int(run[-1]) + 1
      parent = keys[(start - 1) * KEY_BYTES : start * KEY_BYTES] if start else NO_PARENT
      told = keys[start * KEY_BYTES : stop * KEY_BYTES], parent, size, tokens[start * size : stop * size]
      self._told.append(BlockStored(self._now_s(), place, *told))

  # -------------------------------------------------------------------------- from place to place

  def fetchable(self, entry: RequestState, place: str, worker: str) -> int:
    """Tokens of a request's beginning that a place holds and that a worker could go on from, were they sent to it."""
    if not entry.is_cached or place == worker or not self.index.num_blocks(place):
      return 0
    version, tokens = entry.fetchable.get((place, worker), (-1, 0))
    if version != self._version:
      wanted, most = self.making.made_of(worker, worker), (entry.prefill_len - 1) // self.block_tokens
      chains = [made for made in self._chains[place] if self.making.sent_on(made, place, worker) == wanted]
      hits = [self.index.hit(place, self._find(entry, made)[:most]) for made in chains]
      unit = math.gcd(self.page_tokens[place], self.page_tokens[worker])
      tokens = max(hits, default=0) * self.block_tokens // unit * unit
      entry.fetchable[place, worker] = self._version, tokens
    return tokens

  def plan_copy(self, blocks: Blocks, source: str, target: str) -> CopyPlan | None:
    """The blocks of a sequence that a place has, another lacks and somebody there could use; None if there are none."""
    size, most, best = self.block_tokens, (False, 0), None
    own = self.making.made_of(target, target) if self._prefills[target] else None
    for made in self._chains[source]:
      sent_on = self.making.sent_on(made, source, target)
      if not self.making.is_useful(sent_on, target):
        continue
      found = self.index.find(self.making.keys_of(blocks, made))
      held = self.index.hit(source, found)
      if held and (sent_on == own, held) > most:  # what prompts there go on from, before what decodes there
        most, best = (sent_on == own, held), (found, sent_on)
    if best is None:
      return None
    found, made = best
    keys = self.making.keys_of(blocks, made)
    there = self.index.find(keys)
    have = self.index.hit(target, there)
    unit = math.gcd(self.page_tokens[source], self.page_tokens[target])
    start = have * size // self.page_tokens[target] * self.page_tokens[target]
    end = most[1] * size // unit * unit
    if end <= have * size:
      return None
    source_pages = self.index.pages(source, found[: end // size])[start // self.page_tokens[source] :]
    return CopyPlan(keys, made, start, have * size, end, source_pages, self.index.pages(target, there[:have]))

  def note_copied(self, blocks: Blocks, plan: CopyPlan, target: str, pages: Sequence[int], end: int) -> None:
    """Note what a place holds of blocks that were sent to it: those up to a token, in pages from its first one on."""
    keys = plan.keys[: end // self.block_tokens * KEY_BYTES]
    first_page, first = plan.start // self.page_tokens[target], plan.start // self.block_tokens
    if len(keys) > first * KEY_BYTES:
      self._enter(target, plan.made, keys, pages, first_page, first, lambda: blocks)

  def spoil(self, entry: RequestState) -> Blocks:
    """Let nobody find the blocks of a request that ended with an error: there may be numbers that are not finite.

    Returns:
      The blocks, which no place has any more.
    """
    blocks = self.making.blocks(entry)
    for place, chains in self._chains.items():
      for made in chains:
        found = self.index.find(self.making.keys_of(blocks, made))
        self._pages[place].by_kind[self.kind].spoil(self.index.pages_with(place, found))
    return blocks

  def lose(self, worker: str) -> None:
    """Note that a worker's pages are gone."""
    if self.index.forget_place(worker):
      self._told.append(AllBlocksCleared(self._now_s(), worker))
    self._pages[worker].by_kind[self.kind].forget_all()
    self._chains[worker].clear()
    self._version += 1
