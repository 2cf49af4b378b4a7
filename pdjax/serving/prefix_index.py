"""The index of cached blocks over all places: which pages of which place hold a block, found by its key."""

import array
import struct
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from pdjax.serving.block_keys import KEY_BYTES, as_pairs

_EMPTY, _GONE = 0, -1  # in the table; above 0 is a block, counted from 1
_FULLEST = 0.7  # of the table, blocks that are gone counted
_FEW = 12  # blocks up to which a loop over numbers takes less than the calls of NumPy


class _Place:
  """The part of the slots that is one place's: a slot for each block that each of its pages has room for.

  Attributes:
    start: Its first slot.
    stop: The one behind its last.
    blocks_per_page: Blocks of a page.
    num_blocks: Blocks that it holds.
  """

  def __init__(self, start: int, num_pages: int, blocks_per_page: int):
    self.start = start
    self.stop = start + num_pages * blocks_per_page
    self.blocks_per_page = blocks_per_page
    self.num_blocks = 0

  def slots(self, pages: Sequence[int]) -> np.ndarray:
    """The slots of some pages."""
    first = self.start + np.asarray(pages, np.int64) * self.blocks_per_page
    return (first[:, None] + np.arange(self.blocks_per_page)).reshape(-1)


class PrefixIndex:
  """Finds blocks by their keys, and the pages of each place that hold them.

  It is made of arrays (an open table of hashes, a row a block, a slot for each block that a page has room for): some 36
  bytes a block and 8 more for each place that holds it, as a dict of keys takes several times that. A page holds some
  blocks in a row of one sequence; a block has one page at a place at most. The slots that hold a block are a chain.

  Args:
    places: For each place its pages, and the blocks of a page.
  """

  def __init__(self, places: Mapping[str, tuple[int, int]]):
    self._places: dict[str, _Place] = {}
    most = 0
    for name, (pages, blocks) in places.items():
      self._places[name] = _Place(most, pages, blocks)
      most = self._places[name].stop
    self._keys: np.ndarray = np.zeros(
      (max(most, 2), 2), np.uint64
    )  # `find` looks at two rows, if only to pass over them
    self._first: np.ndarray = np.zeros(max(most, 1), np.int32)  # slot of each block, counted from 1; 0 is none
    self._next: np.ndarray = np.zeros(most, np.int32)  # slot behind each that holds the same block, counted likewise
    self._block: np.ndarray = np.zeros(most, np.int32)  # block in each slot, counted from 1; 0 is none
    self._used = 0  # rows from the first one on that were ever taken
    self._free = array.array('i')  # rows of these that are free
    self._num_gone = 0
    self._table = np.zeros(1 << max(most * 2 - 1, 15).bit_length(), np.int32)
    self._mask = np.int64(len(self._table) - 1)
    # The same as numbers, for few blocks; no array ever moves.
    flat = self._keys.reshape(-1)
    self._halves, self._key_bytes = flat.data, flat.view(np.uint8).data
    self._first_at, self._next_at, self._block_at = self._first.data, self._next.data, self._block.data
    self._entries = self._table.data

  def __len__(self) -> int:
    """Blocks that some place holds."""
    return self._used - len(self._free)

  def num_blocks(self, place: str) -> int:
    """Blocks that a place holds."""
    return self._places[place].num_blocks

  # -------------------------------------------------------------------------- finding

  def find(self, keys: bytes) -> np.ndarray:
    """The blocks of some keys, `[N]` int32; -1 where no place has one. They stay the same while some place has them."""
    if len(keys) <= _FEW * KEY_BYTES:
      return np.array([self._find_one(*key) for key in _numbers(keys)], np.int32)
    pairs = as_pairs(keys)
    slots = self._first_slots(pairs)
    found = np.full(len(pairs), -1, np.int32)
    table, rows, left = self._table, self._keys, np.arange(len(pairs))
    while len(left):
      at = table[slots[left]]
      here = rows[at - 1] == pairs[left]
      same = (at > 0) & here[:, 0] & here[:, 1]
      found[left[same]] = at[same] - 1
      left = left[~same & (at != _EMPTY)]
      slots[left] = (slots[left] + 1) & self._mask
    return found

  def _find_one(self, low: int, high: int) -> int:
    entries, halves = self._entries, self._halves
    mask = len(entries) - 1
    slot = low & mask
    while (at := entries[slot]) != _EMPTY:
      if at > 0 and halves[2 * at - 2] == low and halves[2 * at - 1] == high:
        return at - 1
      slot = (slot + 1) & mask
    return -1

  def _first_slots(self, pairs: np.ndarray) -> np.ndarray:
    return pairs[:, 0].astype(np.int64) & self._mask

  def _slots_at(self, of: _Place, blocks: np.ndarray) -> np.ndarray:
    """The slots of a place that hold some blocks, `[N]`; -1 of one that it does not hold, or that is none."""
    if len(blocks) <= _FEW:
      return np.array([self._slot_at(of, block) for block in blocks.tolist()], np.int64)
    slots = np.where(blocks < 0, 0, self._first[blocks]) - 1
    found, left = np.full(len(blocks), -1, np.int64), np.flatnonzero(slots >= 0)
    while len(left):
      at = slots[left]
      here = (at >= of.start) & (at < of.stop)
      found[left[here]] = at[here]
      left = left[~here]
      slots[left] = self._next[slots[left]] - 1
      left = left[slots[left] >= 0]
    return found

  def _slot_at(self, of: _Place, block: int) -> int:
    slot = self._first_at[block] - 1 if block >= 0 else -1
    while slot >= 0 and not of.start <= slot < of.stop:
      slot = self._next_at[slot] - 1
    return slot

  def hit(self, place: str, blocks: np.ndarray) -> int:
    """The number of leading blocks that a place holds."""
    missing = np.flatnonzero(self._slots_at(self._places[place], blocks) < 0)
    return int(missing[0]) if len(missing) else len(blocks)

  def pages(self, place: str, blocks: np.ndarray) -> tuple[int, ...]:
    """The pages of leading blocks that a place holds, in order, those of the last blocks of each.

    A page with a block of a sequence has all that is before it in that page.
    """
    of = self._places[place]
    last = np.minimum(np.arange(0, len(blocks), of.blocks_per_page) + of.blocks_per_page, len(blocks)) - 1
    return tuple(((self._slots_at(of, blocks[last]) - of.start) // of.blocks_per_page).tolist())

  def pages_with(self, place: str, blocks: np.ndarray) -> list[int]:
    """The pages of a place that hold any of some blocks."""
    of = self._places[place]
    slots = self._slots_at(of, blocks)
    return np.unique((slots[slots >= 0] - of.start) // of.blocks_per_page).tolist()

  # -------------------------------------------------------------------------- storing

  def store(self, place: str, keys: bytes, pages: Sequence[int], first: int = 0) -> np.ndarray:
    """Note that pages of a place hold blocks; those that it holds already stay where they are.

    Args:
      place: The place.
      keys: Their keys.
      pages: The pages of the sequence from the one of its first block on.
      first: The number of the first of these blocks in the first of these pages.

    Returns:
      `[N]` of whether each is new there.
    """
    of = self._places[place]
    if len(keys) <= _FEW * KEY_BYTES:
      return self._store_few(of, keys, pages, first)
    blocks = self.find(keys)
    new = self._slots_at(of, blocks) < 0
    if not new.any():
      return new
    if (unknown := np.flatnonzero(blocks < 0)).size:
      blocks[unknown] = self._insert(as_pairs(keys)[unknown])
    at, stored = np.arange(first, first + len(blocks))[new], blocks[new]
    where = np.asarray(pages, np.int64)[at // of.blocks_per_page]
    slots = of.start + where * of.blocks_per_page + at % of.blocks_per_page
    self._block[slots] = stored + 1
    self._next[slots] = self._first[stored]
    self._first[stored] = slots + 1
    of.num_blocks += len(stored)
    return new

  def _store_few(self, of: _Place, keys: bytes, pages: Sequence[int], first: int) -> np.ndarray:
    new: list[bool] = []
    for at, (low, high) in enumerate(_numbers(keys), first):
      block = self._find_one(low, high)
      new.append(block < 0 or self._slot_at(of, block) < 0)
      if new[-1]:
        if block < 0:
          block = self._insert_one(low, high)
        slot = of.start + pages[at // of.blocks_per_page] * of.blocks_per_page + at % of.blocks_per_page
        self._block_at[slot] = block + 1
        self._next_at[slot], self._first_at[block] = self._first_at[block], slot + 1
        of.num_blocks += 1
    return np.array(new, bool)

  def _insert_one(self, low: int, high: int) -> int:
    """A row for a key that is in none."""
    if self._free:
      row = self._free.pop()
    else:
      row = self._used
      self._used += 1
    self._halves[2 * row], self._halves[2 * row + 1] = low, high
    if len(self) + self._num_gone > _FULLEST * len(self._table):
      self._sweep()
      return row
    entries = self._entries
    mask = len(entries) - 1
    slot = low & mask
    while (at := entries[slot]) > 0:
      slot = (slot + 1) & mask
    self._num_gone -= at == _GONE
    entries[slot] = row + 1
    return row

  def _insert(self, pairs: np.ndarray) -> np.ndarray:
    """Rows for keys that are in none; each is there once."""
    count = len(pairs)
    again = self._free[max(len(self._free) - count, 0) :]
    del self._free[len(self._free) - len(again) :]
    fresh = count - len(again)
    rows = np.concatenate([np.array(again, np.int32), np.arange(self._used, self._used + fresh, dtype=np.int32)])
    self._used += fresh
    self._keys[rows] = pairs
    if len(self) + self._num_gone > _FULLEST * len(self._table):
      self._sweep()
    else:
      self._enter(rows, pairs)
    return rows

  def _enter(self, rows: np.ndarray, pairs: np.ndarray) -> None:
    """Put rows into the table, each into the first place that is free behind where it belongs."""
    slots, table, left = self._first_slots(pairs), self._table, np.arange(len(pairs))
    while len(left):
      before = table[slots[left]]
      able, was = left[before <= 0], before[before <= 0]
      table[slots[able]] = rows[able] + 1
      won = table[slots[able]] == rows[able] + 1  # of several that want one slot, the last has it
      self._num_gone -= int(np.count_nonzero(was[won] == _GONE))
      left = np.concatenate([left[before > 0], able[~won]])
      slots[left] = (slots[left] + 1) & self._mask

  def _sweep(self) -> None:
    """Make the table anew, without those that are gone."""
    self._table[:] = _EMPTY
    self._num_gone = 0
    free = np.zeros(self._used, bool)
    free[self._free] = True
    rows = np.flatnonzero(~free).astype(np.int32)
    self._enter(rows, self._keys[rows])

  # -------------------------------------------------------------------------- forgetting

  def forget_pages(self, place: str, pages: Sequence[int]) -> bytes:
    """Note that pages of a place hold nothing any more; the keys of the blocks that they held."""
    of = self._places[place]
    if len(pages) * of.blocks_per_page <= _FEW:
      firsts = [of.start + page * of.blocks_per_page for page in pages]
      return self._forget_few(of, [slot for first in firsts for slot in range(first, first + of.blocks_per_page)])
    return self._forget(of, of.slots(pages))

  def forget_place(self, place: str) -> int:
    """Note that a place holds nothing any more; the number of blocks that it held."""
    of = self._places[place]
    count = of.num_blocks
    self._forget(of, np.arange(of.start, of.stop))
    return count

  def check(self, place: str) -> set[int]:
    """The pages of a place that hold blocks; raises AssertionError where the two sides of that differ."""
    of = self._places[place]
    slots = of.start + np.flatnonzero(self._block[of.start : of.stop])
    held: np.ndarray = self._block[slots] - 1
    assert (self._slots_at(of, held) == slots).all(), f'{place}: a block is of another slot than says so'
    assert len(slots) == len({*held.tolist()}) == of.num_blocks, f'{place}: blocks are counted wrongly'
    assert (self.find(self._keys[held].tobytes()) == held).all(), f'{place}: a block is not found by its key'
    return {*((slots - of.start) // of.blocks_per_page).tolist()}

  def _forget(self, of: _Place, slots: np.ndarray) -> bytes:
    """Empty slots of a place; the keys of the blocks that were in them."""
    slots = slots[self._block[slots] > 0]
    blocks: np.ndarray = self._block[slots] - 1
    keys = self._keys[blocks]
    self._unchain(slots, blocks)
    self._block[slots] = self._next[slots] = 0
    of.num_blocks -= len(slots)
    gone = self._first[blocks] == 0
    if gone.any():
      rows = blocks[gone]
      self._table[self._slots_of(rows, keys[gone])] = _GONE
      self._num_gone += len(rows)
      self._free.frombytes(rows.astype(np.int32).tobytes())
    return keys.tobytes()

  def _forget_few(self, of: _Place, slots: Iterable[int]) -> bytes:
    following, keys = self._next_at, []
    for slot in slots:
      block = self._block_at[slot] - 1
      if block < 0:
        continue
      before = self._first_at[block] - 1
      if before == slot:
        self._first_at[block] = following[slot]
      else:
        while following[before] - 1 != slot:
          before = following[before] - 1
        following[before] = following[slot]
      self._block_at[slot] = following[slot] = 0
      of.num_blocks -= 1
      keys.append(self._key_bytes[KEY_BYTES * block : KEY_BYTES * (block + 1)].tobytes())
      if not self._first_at[block]:
        self._forget_row(block)
    return b''.join(keys)

  def _forget_row(self, row: int) -> None:
    entries = self._entries
    mask = len(entries) - 1
    slot = self._halves[2 * row] & mask
    while entries[slot] != row + 1:
      slot = (slot + 1) & mask
    entries[slot] = _GONE
    self._num_gone += 1
    self._free.append(row)

  def _unchain(self, slots: np.ndarray, blocks: np.ndarray) -> None:
    """Take slots out of the chains of their blocks, each of another."""
    before = self._first[blocks].astype(np.int64) - 1
    is_first = before == slots
    self._first[blocks[is_first]] = self._next[slots[is_first]]
    slots, before = slots[~is_first], before[~is_first]
    while len(slots):
      following = self._next[before] - 1
      found = following == slots
      self._next[before[found]] = self._next[slots[found]]
      slots, before = slots[~found], following[~found].astype(np.int64)

  def _slots_of(self, rows: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """The slots of rows that are in the table."""
    slots, left = self._first_slots(pairs), np.arange(len(rows))
    while len(left):
      left = left[self._table[slots[left]] != rows[left] + 1]
      slots[left] = (slots[left] + 1) & self._mask
    return slots


def _numbers(keys: bytes) -> Iterable[tuple[int, int]]:
  """Keys as pairs of numbers."""
  return struct.iter_unpack('<QQ', keys)
