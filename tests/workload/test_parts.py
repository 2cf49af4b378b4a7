"""A source as a part of a greater one lives in its own time, and nothing of it is taken for another's."""

import math

from pdjax.serving.events import Arrived, Finished
from pdjax.types.request import Request, SamplingParams
from pdjax.workload import BlockTokens, Chat, Chats, ChatTurn, ClosedLoop, Listed, RandomTokens
from pdjax.workload.parts import Merged, Placed


def times(source, now_s, finished=()):
  return {event.request.id: event.request.arrival_s for event in source.due(now_s, finished)}


def test_a_part_begins_at_its_time_and_ends_after_its_seconds():
  requests = [Request(f'r{i}', (1,), arrival_s=float(i)) for i in range(4)]
  part = Placed(Listed(requests, {'r1': 7}), 'a/', start_s=10.0, seconds=2.0)
  assert part.next_s() == 10.0 and times(part, 9.0) == {}
  assert times(part, 10.5) == {'a/r0': 10.0} and part.next_s() == 11.0
  assert times(part, 50.0) == {'a/r1': 11.0} and part.next_s() == math.inf
  assert part.closed
  assert (part.output_len('a/r1'), part.output_len('r1'), part.output_len('b/r1')) == (7, None, None)


def test_a_part_hears_of_its_own_ends_alone_and_in_its_own_time():
  requests = [Request(f'r{i}', (1,), SamplingParams(n=2)) for i in range(3)]
  part = Placed(ClosedLoop(requests, max_concurrency=1, think_s=1.0), 'a/', start_s=10.0)
  assert times(part, 10.0) == {'a/r0': 10.0}
  others = [Finished(11.0, 'r0', 'length', (1,)), Finished(11.0, 'b/r0', 'length', (1,))]
  assert times(part, 11.0, others) == {} and part.next_s() == math.inf and not part.closed
  assert times(part, 12.5, [Finished(12.5, 'a/r0', 'length', (1,))]) == {} and part.next_s() == math.inf
  assert times(part, 13.0, [Finished(13.0, 'a/r0#1', 'length', (1,))]) == {} and part.next_s() == 14.0


def test_nobody_follows_once_a_part_is_over():
  requests = [Request(f'r{i}', (1,)) for i in range(3)]
  part = Placed(ClosedLoop(requests, max_concurrency=1, think_s=1.0), '', seconds=5.0)
  part.due(0.0)
  assert not part.closed  # its end may be followed
  assert times(part, 4.5, [Finished(4.5, 'r0', 'length', (1,))]) == {}
  assert part.closed and part.next_s() == math.inf


def test_a_part_is_over_at_its_end_whoever_goes_on():
  part = Placed(ClosedLoop([Request(f'r{i}', (1,)) for i in range(3)], max_concurrency=1), '', seconds=5.0)
  part.due(0.0)
  assert times(part, 5.0) == {} and part.closed


def test_chats_of_a_part_go_on_with_its_names():
  turns = (ChatTurn((1, 2), output_len=2), ChatTurn((3,)))
  part = Placed(Chats([Chat('c', turns)], 999, think_s=1.0), 'talk/', {'class_name': 'talk'}, start_s=0.1)
  (first,) = part.due(1.0)
  assert (first.request.id, first.request.session, first.request.class_name) == ('talk/c-turn-0', 'talk/c', 'talk')
  assert part.output_len('talk/c-turn-0') == 2
  part.due(2.0, [Finished(2.0, 'talk/c-turn-0', 'length', (8, 9))])
  next_s = part.next_s()
  (second,) = part.due(next_s)  # whatever the sums are rounded to
  assert second.request.prompt == (1, 2, 8, 9, 3) and math.isclose(second.request.arrival_s, 3.0)
  assert part.closed  # it was the last turn


def test_what_a_part_is_due_at_its_next_time_whatever_is_rounded():
  for step in range(200):
    part = Placed(ClosedLoop([Request('a', (1,)), Request('b', (1,))], 1, think_s=0.1 * step), '', start_s=0.3)
    part.due(0.3)
    part.due(0.7, [Finished(0.7, 'a', 'length', (1,))])
    if math.isfinite(next_s := part.next_s()):
      assert len(part.due(next_s)) == 1


def test_drawn_tokens_of_parts_are_apart_and_blocks_are_shared_within_one():
  def requests():
    plain = Request('p', RandomTokens(8, 1000, 5))
    blocks = [
      Request(f'b{i}', BlockTokens(8, 1000, (3, 2**64 - 1), 4, seed=i), block_hashes=(3, 2**64 - 1), block_size=4)
      for i in range(2)
    ]
    given = Request('g', (1, 2, 3))
    return Listed([plain, *blocks, given])

  parts = [
    [event.request for event in Placed(requests(), f'{n}/', number=n).due(math.inf) if isinstance(event, Arrived)]
    for n in range(3)
  ]
  assert len({tuple(one[0].prompt) for one in parts}) == 3
  assert len({tuple(one[1].prompt) for one in parts}) == 3 and len({one[1].block_hashes for one in parts}) == 3
  for _, first, second, given in parts:
    assert tuple(first.prompt) == tuple(second.prompt) and first.block_hashes == second.block_hashes
    assert first.prompt.block_hashes == first.block_hashes
    assert given.prompt == (1, 2, 3)
  assert tuple(parts[0][0].prompt) == tuple(RandomTokens(8, 1000, 5))


def test_merged_sources_come_in_the_order_of_arrival_and_close_together():
  early = Listed([Request('a', (1,), arrival_s=1.0), Request('b', (1,), arrival_s=3.0)], {'a': 4})
  late = Listed([Request('c', (1,), arrival_s=2.0)], {'c': 5})
  merged = Merged([early, late])
  assert merged.next_s() == 1.0
  assert list(times(merged, 2.5)) == ['a', 'c'] and not merged.closed
  assert (merged.output_len('a'), merged.output_len('c'), merged.output_len('d')) == (4, 5, None)
  assert list(times(merged, 3.0)) == ['b'] and merged.closed
