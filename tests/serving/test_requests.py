"""A request's phase changes along the table of moves, and in no other way."""

import pytest

from pdjax.serving.requests import MOVES, Phase, RequestState, enter
from pdjax.types import Request, WorkerSpec
from pdjax.types.pools import PoolSpecs
from tests.serving.driver import TINY


@pytest.mark.parametrize('before', Phase)
@pytest.mark.parametrize('after', Phase)
def test_a_phase_changes_along_the_table_alone(before, after):
  entry = RequestState(Request('a', (1, 2)), limit=3, phase=before)
  if after in MOVES[before]:
    enter(entry, after)
    assert entry.phase is after
  else:
    with pytest.raises(AssertionError, match=f'a is {before.value} and cannot be {after.value}'):
      enter(entry, after)
    assert entry.phase is before


def test_every_phase_has_a_way_to_an_end_and_the_end_has_none_on():
  assert MOVES.keys() == set(Phase) and MOVES[Phase.FINISHED] == frozenset()
  reached = {Phase.FINISHED}
  while more := {phase for phase, moves in MOVES.items() if moves & reached} - reached:
    reached |= more
  assert reached == set(Phase)
  assert MOVES[Phase.PREFILLED] & {Phase.DECODING, Phase.WAITING, Phase.PREFILLED} == set()  # it moves first


@pytest.mark.parametrize(
  ('decodes', 'page_size', 'pages'), [(False, 4, 2), (True, 4, 3), (False, 8, 1), (True, 8, 2), (True, 1, 10)]
)
def test_pages_of_one_sequence_hold_its_prompt_or_all_but_its_last_token(decodes, page_size, pages):
  entry = RequestState(Request('a', (1,) * 7), limit=4)
  pools = PoolSpecs.of(TINY, WorkerSpec('w', page_size=page_size))
  assert entry.own_pages(pools, decodes=decodes) == entry.pages_needed(pools, decodes=decodes) == {'kv': pages}
  assert entry.slots_needed == 1 and entry.followers == {}
