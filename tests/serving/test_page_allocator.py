"""Pages are free when nobody holds them."""

import pytest

from pdjax.serving.page_allocator import PageAllocator


def test_pages_are_taken_longest_free_first():
  allocator = PageAllocator(4)
  first = allocator.take(3)
  assert first == (0, 1, 2) and allocator.num_free == 1
  allocator.drop((1,))
  allocator.drop((0, 2))
  assert allocator.take(4) == (3, 1, 0, 2) and allocator.num_free == 0


def test_a_page_on_an_unfinished_transfer_is_not_free():
  allocator = PageAllocator(2)
  pages = allocator.take(2)
  allocator.hold(pages)  # a transfer
  allocator.drop(pages)  # the request ends
  assert allocator.num_free == 0
  allocator.drop(pages)  # the transfer ends
  assert allocator.num_free == 2


def test_more_pages_than_are_free_are_refused_and_none_taken():
  allocator = PageAllocator(3)
  allocator.take(1)
  with pytest.raises(ValueError, match='3 pages wanted, 2 of 3 free'):
    allocator.take(3)
  assert allocator.take(2) == (1, 2)


def test_no_page_is_dropped_twice():
  allocator = PageAllocator(2)
  pages = allocator.take(1)
  allocator.drop(pages)
  with pytest.raises(AssertionError, match='page 0 is free already'):
    allocator.drop(pages)
