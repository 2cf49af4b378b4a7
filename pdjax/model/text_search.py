"""Texts looked for in a text that comes in pieces (Aho and Corasick 1975): a character costs the same whatever came."""

from collections.abc import Sequence


class TextSearch:
  """The texts to look for, as an automaton over characters; its states are numbers, and a search begins in state 0.

  A state stands for the longest end of what was read that one of the texts begins with.
  """

  def __init__(self, texts: Sequence[str]):
    """Look for `texts`, none of them empty."""
    self._next: list[dict[str, int]] = [{}]
    self._shorter = [0]  # the state of the longest shorter end that a text begins with
    self._depth = [0]
    self._complete = [0]
    for text in texts:
      state = 0
      for char in text:
        if char not in self._next[state]:
          self._next[state][char] = len(self._next)
          self._next.append({})
          self._shorter.append(0)
          self._depth.append(self._depth[state] + 1)
          self._complete.append(0)
        state = self._next[state][char]
      self._complete[state] = len(text)
    self._starts = frozenset(self._next[0])
    nearer = list(self._next[0].values())  # breadth first: a shorter end's state is ready before it is needed
    for state in nearer:
      for char, longer in self._next[state].items():
        self._shorter[longer] = self.step(self._shorter[state], char)
        self._complete[longer] = self._complete[longer] or self._complete[self._shorter[longer]]
        nearer.append(longer)

  def step(self, state: int, char: str) -> int:
    """The state after one more character."""
    while state and char not in self._next[state]:
      state = self._shorter[state]
    return self._next[state].get(char, 0)

  def read(self, state: int, text: str, start: int = 0) -> tuple[int, int | None]:
    """Read `text` from `start` on, up to the first place where one of the texts is complete.

    Returns:
      The state there and how many characters of `text` end there; or the state after all of it and None.
    """
    if not state and self._starts.isdisjoint(text):
      return 0, None
    for at in range(start, len(text)):
      state = self.step(state, text[at])
      if self._complete[state]:
        return state, at + 1
    return state, None

  def begun(self, state: int) -> int:
    """Length of the longest end of what was read that one of the texts begins with."""
    return self._depth[state]

  def complete(self, state: int) -> int:
    """Length of the longest of the texts that is complete here, 0 if none is."""
    return self._complete[state]
