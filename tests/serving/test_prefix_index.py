"""The index of cached blocks, and the pages that hold them, against models that anyone can follow."""

import random
from collections import OrderedDict

import numpy as np
import pytest

from pdjax.serving import prefix_index
from pdjax.serving.block_keys import BlockHasher, split
from pdjax.serving.page_allocator import PageAllocator
from pdjax.serving.prefix_index import PrefixIndex

HASHER = BlockHasher(2)


def keys_of(*tokens: int) -> bytes:
  return HASHER.keys(tokens)


def test_a_block_is_found_where_it_was_stored():
  index = PrefixIndex({'a': (8, 1), 'b': (8, 1)})
  keys = keys_of(1, 2, 3, 4, 5, 6)
  assert index.find(keys).tolist() == [-1, -1, -1] and index.hit('a', index.find(keys)) == 0
  assert index.store('a', keys[:32], (5, 2)).tolist() == [True, True]
  blocks = index.find(keys)
  assert (index.hit('a', blocks), index.hit('b', blocks)) == (2, 0)
  assert index.pages('a', blocks[:2]) == (5, 2)
  assert index.store('b', keys, (0, 1, 7)).tolist() == [True] * 3
  assert index.store('a', keys, (6, 6, 3)).tolist() == [False, False, True]  # the others stay where they are
  blocks = index.find(keys)
  assert index.pages('a', blocks) == (5, 2, 3) and index.pages('b', blocks) == (0, 1, 7)
  assert len(index) == 3 and index.num_blocks('a') == index.num_blocks('b') == 3


def test_an_index_of_one_block_or_none_looks_for_others_too():
  index, keys = PrefixIndex({'a': (1, 1)}), keys_of(1, 2, 3, 4)
  index.store('a', keys[:16], (0,))
  assert index.forget_pages('a', [0]) == keys[:16]
  assert index.find(keys).tolist() == [-1, -1]  # where the block that is gone was, too
  assert PrefixIndex({'a': (0, 1)}).find(keys).tolist() == [-1, -1]


def test_pages_of_unlike_sizes_share_the_index():
  index = PrefixIndex({'small': (8, 1), 'large': (4, 4)})
  keys = keys_of(*range(12))
  index.store('small', keys, (0, 1, 2, 3, 4, 5))
  index.store('large', keys[:80], (3, 1))
  blocks = index.find(keys)
  assert (index.hit('small', blocks), index.hit('large', blocks)) == (6, 5)
  assert index.pages('large', blocks[:5]) == (3, 1)
  index.store('large', keys[80:], (1,), first=1)
  assert index.hit('large', index.find(keys)) == 6 and index.pages('large', index.find(keys)) == (3, 1)
  assert index.forget_pages('large', [3]) == keys[:64]
  assert index.hit('large', index.find(keys)) == 0 and index.num_blocks('large') == 2


def test_the_page_of_a_branch_has_what_is_before_it_too():
  """Of two sequences that part within a page, the second has a page of its own for what both share."""
  index = PrefixIndex({'a': (4, 4)})
  one, other = keys_of(1, 1, 2, 2, 3, 3, 4, 4), keys_of(1, 1, 2, 2, 7, 7, 8, 8)
  index.store('a', one, (0,))
  assert index.store('a', other, (1,)).tolist() == [False, False, True, True]
  assert index.pages('a', index.find(one)) == (0,)
  assert index.pages('a', index.find(other)) == (1,)
  assert index.pages('a', index.find(other[:32])) == (0,)


def test_a_place_that_is_lost_holds_nothing_and_others_do():
  index = PrefixIndex({'a': (8, 1), 'b': (8, 1)})
  keys = keys_of(*range(8))
  index.store('a', keys, (0, 1, 2, 3))
  index.store('b', keys[:32], (4, 5))
  assert index.forget_place('a') == 4
  blocks = index.find(keys)
  assert blocks[2:].tolist() == [-1, -1] and index.hit('b', blocks) == 2 and index.hit('a', blocks) == 0
  assert len(index) == 2 and index.forget_place('b') == 2 and len(index) == 0


class Naive:
  """Blocks by place and key, and the keys of each page."""

  def __init__(self, places):
    self.page_of = {place: {} for place in places}

  def store(self, place, keys, pages, first, per_page):
    for number, key in enumerate(keys):
      self.page_of[place].setdefault(key, pages[(first + number) // per_page])

  def forget(self, place, pages):
    for key in [key for key, page in self.page_of[place].items() if page in pages]:
      del self.page_of[place][key]

  def hit(self, place, keys):
    held = [key in self.page_of[place] for key in keys]
    return held.index(False) if False in held else len(held)


@pytest.mark.parametrize(('seed', 'few'), [(0, 0), (1, 0), (2, 3), (3, prefix_index._FEW)])
def test_it_says_what_a_model_of_dicts_says(seed, few, monkeypatch):
  """5,000 operations on three places, whose sequences branch from one another; some, none or all in NumPy."""
  monkeypatch.setattr(prefix_index, '_FEW', few)
  rng = random.Random(seed)
  sizes = {'a': (40, 1), 'b': (12, 4), 'c': (30, 2)}
  index, naive = PrefixIndex(sizes), Naive(sizes)
  allocators = {place: PageAllocator(pages) for place, (pages, _) in sizes.items()}
  for place, allocator in allocators.items():
    allocator.forget = lambda pages, place=place: (index.forget_pages(place, pages), naive.forget(place, {*pages}))
  held = []

  def sequence() -> list[int]:
    return [0, 0] * rng.randint(0, 4) + [rng.randrange(3) for _ in range(2 * rng.randint(1, 6))]

  for _ in range(5000):
    place = rng.choice('abc')
    allocator, (_, per_page) = allocators[place], sizes[place]
    keys = keys_of(*sequence())
    split_keys = split(keys)
    blocks = index.find(keys)
    hit = index.hit(place, blocks)
    assert hit == naive.hit(place, split_keys)
    pages = index.pages(place, blocks[:hit])
    last = [split_keys[min(start + per_page, hit) - 1] for start in range(0, hit, per_page)]
    assert pages == tuple(naive.page_of[place][key] for key in last)
    match rng.randrange(10):
      case 0 | 1 | 2 | 3 | 4:  # a request begins with the whole pages that are hit
        whole = pages[: hit // per_page]
        allocator.hold(whole)
        lacking = -(-len(split_keys) // per_page) - len(whole)
        if lacking > allocator.num_free:
          allocator.drop(whole)
          continue
        own = (*whole, *allocator.take(lacking))
        first = len(whole) * per_page
        new = index.store(place, keys[16 * first :], own[len(whole) :])
        fresh = [key for key in split_keys[first:] if key not in naive.page_of[place]]
        assert int(new.sum()) == len(fresh)
        naive.store(place, split_keys[first:], own[len(whole) :], 0, per_page)
        allocator.cache([page for page in own if page in naive.page_of[place].values()])
        held.append((place, own))
      case 5 | 6 | 7 | 8:
        if held:
          one, own = held.pop(rng.randrange(len(held)))
          allocators[one].drop(own)
      case 9 if rng.random() < 0.02:
        index.forget_place(place)
        naive.page_of[place].clear()
        allocator.forget_all()
    assert index.num_blocks(place) == len(naive.page_of[place])
    assert len(index) == len({key for of in naive.page_of.values() for key in of})
  for place, own in held:
    allocators[place].drop(own)
  for place, allocator in allocators.items():
    assert allocator.num_free == allocator.num_pages and sorted(allocator.free()) == [*range(allocator.num_pages)]
    assert allocator.num_cached == len({*naive.page_of[place].values()})


def test_the_oldest_cached_pages_go_first_and_never_one_that_is_held():
  """Against an ordered dict, in 20,000 operations."""
  rng = random.Random(3)
  allocator, forgotten = PageAllocator(24), []
  allocator.forget = forgotten.extend
  blank, kept, holders, cached = OrderedDict.fromkeys(range(24)), OrderedDict(), [0] * 24, set()
  for _ in range(20_000):
    holding = [page for page in range(24) if holders[page]]
    match rng.randrange(5):
      case 0 | 1:
        count = rng.randint(0, 6)
        if count > len(blank) + len(kept):
          with pytest.raises(ValueError, match=f'{count} pages wanted, {len(blank) + len(kept)} of 24 free'):
            allocator.take(count)
          continue
        expected = [(blank or kept).popitem(last=False)[0] for _ in range(count)]
        gone = [page for page in expected if page in cached]
        cached -= {*gone}
        assert list(allocator.take(count)) == expected and forgotten == gone
        forgotten.clear()
        for page in expected:
          holders[page] = 1
      case 2 | 3 if holding:
        pages = rng.sample(holding, rng.randint(1, len(holding)))
        allocator.drop(pages)
        for page in pages:
          holders[page] -= 1
        free = [page for page in pages if not holders[page]]
        blank.update(dict.fromkeys(page for page in free if page not in cached))
        kept.update(dict.fromkeys(page for page in reversed(free) if page in cached))
      case 4:
        if rng.random() < 0.01:
          allocator.forget_all()
          blank.update(dict.fromkeys(kept))
          kept.clear()
          cached.clear()
        if holding:
          some = rng.sample(holding, rng.randint(1, len(holding)))
          allocator.cache(some)
          cached |= {*some}
        again = rng.sample(sorted(kept), min(len(kept), 2)) + rng.sample(holding, min(len(holding), 2))
        allocator.hold(again)
        for page in again:
          holders[page] += 1
          kept.pop(page, None)
    assert allocator.free() == [*blank, *kept]
    assert (allocator.num_free, allocator.num_cached) == (len(blank) + len(kept), len(kept))


def test_a_page_without_content_is_held_by_whoever_takes_it_alone():
  allocator = PageAllocator(2)
  with pytest.raises(AssertionError, match='page 1 is free and has no content'):
    allocator.hold((1,))
  with pytest.raises(AssertionError, match='page 0 is held by nobody'):
    allocator.cache((0,))


@pytest.mark.parametrize('few', [0, prefix_index._FEW])
def test_the_table_stays_sound_over_many_times_its_size(few, monkeypatch):
  """Rows that are gone and taken again, and the table swept, change no answer."""
  monkeypatch.setattr(prefix_index, '_FEW', few)
  index = PrefixIndex({'a': (64, 1)})
  keys = [BlockHasher(1).keys([number]) for number in range(4000)]
  for number, key in enumerate(keys):
    index.store('a', key, (number % 64,))
    if number >= 63:
      assert index.forget_pages('a', [(number + 1) % 64]) == keys[number - 63]
    assert index.find(key)[0] >= 0
  live = index.find(b''.join(keys))
  assert np.flatnonzero(live >= 0).tolist() == [*range(4000 - 63, 4000)] and len(index) == 63
