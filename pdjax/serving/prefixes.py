"""Cached prefixes: what places hold of the beginning of a prompt, and what becomes of the pages of those that end."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from pdjax.serving.block_keys import KEY_BYTES, NO_PARENT, BlockHasher, as_array, stand_ins
from pdjax.serving.events import AllBlocksCleared, BlockRemoved, BlockStored, Event
from pdjax.serving.page_allocator import PlacePages
from pdjax.serving.prefix_index import PrefixIndex
from pdjax.serving.requests import RequestState
from pdjax.types.cache import KVDtypeName, wire_dtype
from pdjax.types.model import ModelSpec
from pdjax.types.prefix_cache import PrefixCache
from pdjax.types.worker import WorkerSpec

_MOST_HASHERS = 4096  # of tenants and ways of making; more are made anew


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
_NO_BLOCKS = np.zeros(0, np.int32)


class Prefixes:
  """Finds the pages that a place holds of a sequence, and notes those that are filled.

  A place takes only blocks that the same request would have brought it without a cache: made with the weights of the
  worker that prefills it, and gone through the same dtypes on the way. What decode made counts for a prompt where that
  is the same.

  Attributes:
    index: The blocks of all places.
    kind: The cache kind that is kept.
    block_tokens: Tokens of a block.
  """

  def __init__(
    self,
    model: ModelSpec,
    settings: PrefixCache,
    workers: Mapping[str, WorkerSpec],
    pages: Mapping[str, PlacePages],
    now_s: Callable[[], float],
    told: list[Event],
  ):
    """Begin with nothing cached.

    Args:
      model: The model served.
      settings: The settings.
      workers: Each worker, its page size filled in.
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
    self._model = model
    self._settings = settings
    self._workers = workers
    self._pages = pages
    self._now_s = now_s
    self._told = told
    self._page_tokens: dict[str, int] = {}
    places = {}
    for name, worker in workers.items():
      assert worker.page_size is not None
      self._page_tokens[name] = size = kind.entries_per_page(worker.page_size)
      if size % settings.block_tokens:
        raise ValueError(
          f'prefix_cache.block_tokens is {settings.block_tokens}, which does not divide the page size of worker '
          f'{name!r}, {size}; set it to a number that divides every page size.'
        )
      places[name] = pages[name].by_kind[kind.name].num_pages, size // settings.block_tokens
    self.index = PrefixIndex(places)
    self.block_tokens = settings.block_tokens
    self._version = 0  # counts the changes of the index
    self._made: dict[tuple[str, str], tuple[str, ...]] = {}
    self._hashers: dict[tuple[tuple[str, ...], str], BlockHasher] = {}
    for name, place in pages.items():
      place.by_kind[kind.name].forget = functools.partial(self._forget, name)

  def _forget(self, worker: str, pages: Sequence[int]) -> None:
    if keys := self.index.forget_pages(worker, pages):
      self._told.append(BlockRemoved(self._now_s(), worker, keys))
    self._version += 1

  # -------------------------------------------------------------------------- keys

  def made_of(self, source: str, target: str) -> tuple[str, ...]:
    """The way in which the blocks of a place are made: model, weights, cache, and dtypes in which they lose something.

    Args:
      source: The worker that computes them.
      target: The place; the same, or one that they are sent to.
    """
    way = source, target
    if way not in self._made:
      ours, theirs = self._workers[source], self._workers[target]
      if self._settings.lossy:
        made: tuple[str, ...] = (self._model.name,)
      else:
        weights = str(ours.weights or ours.cached_dtype)
        made = (self._model.name, weights, *_dtypes(weights, ours.cached_dtype, theirs.cached_dtype))
      self._made[way] = made
    return self._made[way]

  def _hasher(self, made: tuple[str, ...], salt: str) -> BlockHasher:
    hasher = self._hashers.get((made, salt))
    if hasher is None:
      if len(self._hashers) >= _MOST_HASHERS:
        self._hashers.clear()
      hasher = self._hashers[made, salt] = BlockHasher(self.block_tokens, made, salt)
    return hasher

  def _has_hashes(self, entry: RequestState) -> bool:
    """Whether ids of blocks stand for the tokens of a request."""
    return self._settings.trusts_block_hashes and entry.request.block_size is not None

  def _keys(self, entry: RequestState, made: tuple[str, ...]) -> bytes:
    """The keys of the whole blocks of what is to be computed of a request before it decodes."""
    known, keys = entry.keys.get(made, (-1, b''))
    if known != len(entry.delivered):
      request = entry.request
      if self._has_hashes(entry):
        assert request.block_size is not None
        tokens = stand_ins(request.block_hashes, request.block_size, request.prompt_len)
        keys = self._hasher((*made, f'ids of {request.block_size} tokens'), request.salt).keys(tokens)
      else:
        tokens = as_array(request.prompt)
        if entry.delivered:
          tokens = np.concatenate([tokens, as_array(entry.delivered[:-1])])
        keys = self._hasher(made, request.salt).keys(tokens)
      entry.keys[made] = len(entry.delivered), keys
    return keys

  # -------------------------------------------------------------------------- hits

  def hit(self, entry: RequestState, worker: str, source: str | None = None) -> int:
    """Tokens of a request's beginning that a worker holds: in whole blocks where it computes the prompt, else in pages.

    Args:
      entry: The request.
      worker: The worker.
      source: The worker that computes the prompt; None for the same, which has to compute a token at least.
    """
    if not entry.request.cache_prefix or not self.index.num_blocks(worker):
      return 0
    version, tokens = entry.hits.get((worker, source), (-1, 0))
    if version != self._version:
      is_computed_here = source is None or source == worker
      most = entry.prefill_len - is_computed_here
      found = self._find(entry, self.made_of(source or worker, worker))[: most // self.block_tokens]
      tokens = self.index.hit(worker, found) * self.block_tokens
      if not is_computed_here:
        tokens -= tokens % self._page_tokens[worker]
      entry.hits[worker, source] = self._version, tokens
    return tokens

  def _find(self, entry: RequestState, made: tuple[str, ...]) -> np.ndarray:
    """The blocks of a request's beginning that some place holds, looked up once until the index changes."""
    version, found = entry.found.get(made, (-1, _NO_BLOCKS))
    if version != self._version:
      found = self.index.find(self._keys(entry, made))
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
    tokens -= tokens % self._page_tokens[worker]
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
    tokens = min(self.hit(entry, worker), most, found.tokens + self._page_tokens[worker] - 1)
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
    found = self._find(entry, self.made_of(source or worker, worker))
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
    if entry.request.cache_prefix:
      keys = self._keys(entry, self.made_of(source, worker))
      self._store(entry, worker, keys[: tokens // self.block_tokens * KEY_BYTES], entry.delivered)

  def note_decoded(self, entry: RequestState, worker: str, source: str) -> None:
    """Note what a request leaves behind where it decoded: the tokens that it generated but the last.

    Not where a prompt with these tokens would be made in another way.
    """
    made = self.made_of(source, worker)
    if not entry.request.cache_prefix or made != self.made_of(worker, worker):
      return
    if self._has_hashes(entry):  # nobody can say what is asked with these tokens
      return
    size, keys = self.block_tokens, self._keys(entry, made)
    first = len(keys) // KEY_BYTES * size
    sequence = [*entry.request.prompt[first:], *entry.tokens[max(first - entry.prompt_len, 0) : -1]]
    parent = keys[-KEY_BYTES:] or NO_PARENT
    keys += self._hasher(made, entry.request.salt).keys(sequence, parent)
    self._store(entry, worker, keys, entry.tokens)

  def _store(self, entry: RequestState, worker: str, keys: bytes, generated: Sequence[int]) -> None:
    """Note that the pages of a request hold the blocks of these keys."""
    first = entry.stored.get(worker, 0)
    if len(keys) <= first * KEY_BYTES:
      return
    per_page = self._page_tokens[worker] // self.block_tokens
    pages = entry.pages[worker][self.kind][first // per_page :]
    new = self.index.store(worker, keys[first * KEY_BYTES :], pages, first % per_page)
    entry.stored[worker] = len(keys) // KEY_BYTES
    if new.any():
      stored = np.flatnonzero(new) + first
      places = stored // per_page - first // per_page
      self._pages[worker].by_kind[self.kind].cache({pages[place] for place in places.tolist()})
      self._version += 1
      self._tell(entry, worker, keys, stored, generated)

  def _tell(self, entry: RequestState, worker: str, keys: bytes, stored: np.ndarray, generated: Sequence[int]) -> None:
    """Tell of the blocks of a sequence that are new at a worker, an event for each run of them."""
    size = self.block_tokens
    tokens: tuple[int, ...] = ()
    if self._settings.log_tokens and not self._has_hashes(entry):
      tokens = (*entry.request.prompt, *generated)
    is_one_run = stored[-1] - stored[0] == len(stored) - 1  # mostly; `np.split` takes as long as all the rest
    for run in [stored] if is_one_run else np.split(stored, np.flatnonzero(np.diff(stored) > 1) + 1):
      start, stop = int(run[0]), int(run[-1]) + 1
      parent = keys[(start - 1) * KEY_BYTES : start * KEY_BYTES] if start else NO_PARENT
      told = keys[start * KEY_BYTES : stop * KEY_BYTES], parent, size, tokens[start * size : stop * size]
      self._told.append(BlockStored(self._now_s(), worker, *told))

  def spoil(self, entry: RequestState) -> None:
    """Let nobody find what a request holds that ended with an error: there may be numbers in it that are not finite."""
    for worker, pages in entry.pages.items():
      self._pages[worker].by_kind[self.kind].spoil(pages[self.kind])

  def lose(self, worker: str) -> None:
    """Note that a worker's pages are gone."""
    if self.index.forget_place(worker):
      self._told.append(AllBlocksCleared(self._now_s(), worker))
    self._pages[worker].by_kind[self.kind].forget_all()
    self._version += 1


def _dtypes(computed: str, source: KVDtypeName, target: KVDtypeName) -> list[str]:
  """The dtype of the cache that later tokens attend to as they are computed, and those on the way that change them."""
  dtypes = [computed if source in (computed, 'float32') else source]
  for dtype in (wire_dtype(source, target), target):
    if dtype not in (dtypes[-1], 'float32'):
      dtypes.append(dtype)
  return dtypes
