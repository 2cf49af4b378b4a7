"""Texts looked for in pieces are found where the first of them is complete, and a character costs the same."""

from hypothesis import given
from hypothesis import strategies as st

from pdjax.model.text_search import TextSearch

TEXTS = st.lists(st.text('ab', min_size=1, max_size=6), min_size=1, max_size=4)


@given(TEXTS, st.text('abc', max_size=30), st.integers(0, 30))
def test_the_first_text_to_be_complete_is_found(texts, text, cut):
  search = TextSearch(texts)
  state, end = search.read(0, text[:cut])
  if end is None:
    state, more = search.read(state, text[cut:])
    end = None if more is None else len(text[:cut]) + more
  ends = [at for at in range(1, len(text) + 1) if any(text[:at].endswith(one) for one in texts)]
  assert end == (ends[0] if ends else None)
  read = text[:end]
  assert search.complete(state) == max((len(one) for one in texts if read.endswith(one)), default=0)
  begun = (size for size in range(len(read), -1, -1) if any(one.startswith(read[len(read) - size :]) for one in texts))
  assert search.begun(state) == next(begun)


def test_long_texts_that_almost_come_cost_a_character_no_more():
  search = TextSearch([f'{"ab" * 500}{n}' for n in range(16)])
  steps = 0

  class Counted(TextSearch):
    def __init__(self):
      vars(self).update(vars(search))
      self._shorter = CountedList(search._shorter)

  class CountedList(list):
    def __getitem__(self, index):
      nonlocal steps
      steps += 1
      return super().__getitem__(index)

  counted, state = Counted(), 0
  for _ in range(3000):
    state, end = counted.read(state, 'ab')
    assert end is None
  assert counted.begun(state) == 1000 and steps <= 6000
