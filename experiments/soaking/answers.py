"""The right answers: each request answered once by a cluster that nobody disturbs."""

from collections.abc import Callable, Iterable

from experiments.soaking.clusters import Alone
from pdjax.types import Completion, Request, SamplingParams

_Question = tuple[tuple[int, ...], SamplingParams]


class Answers:
  """Answers of an undisturbed cluster, remembered.

  Args:
    cluster: The cluster.
    most: Answers to remember.
    going_on: Called while it serves, as it goes on.
  """

  def __init__(self, cluster: Alone, most: int = 4000, going_on: Callable[[], None] = lambda: None):
    self._cluster = cluster
    self._most = most
    self._going_on = going_on
    self._known: dict[_Question, Completion] = {}

  def learn(self, requests: Iterable[Request]) -> None:
    """Have all samples of these answered that are not yet; until the next call all of them are known."""
    asked = [_question(sample) for request in requests for sample in request.samples()]
    for question in asked:  # what is asked again is forgotten last
      if question in self._known:
        self._known[question] = self._known.pop(question)
    new = list(dict.fromkeys(question for question in asked if question not in self._known))
    if new:
      alone = [Request(str(index), prompt, sampling) for index, (prompt, sampling) in enumerate(new)]
      for answer in self._cluster.serve(alone, lambda event: self._going_on()):
        self._known[new[int(answer.request.id)]] = answer
    for question in list(self._known)[: max(len(self._known) - max(self._most, len(asked)), 0)]:
      del self._known[question]

  def of(self, sample: Request) -> Completion:
    """The answer to one sample of a request that was learnt."""
    return self._known[_question(sample)]


def _question(sample: Request) -> _Question:
  assert sample.sampling.n == 1
  return tuple(sample.prompt), sample.sampling
