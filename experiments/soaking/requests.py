"""Requests of a soak: prompts and samplings drawn at random, and users who read, cancel and go on with a chat."""

import dataclasses
import random

from experiments.soaking.clusters import MODEL, tokenizer
from pdjax.types import Completion, Request, SamplingParams

_WORDS = range(2, 2 + 256)  # tokens that have text


@dataclasses.dataclass(frozen=True)
class Wish:
  """A question, and how it is to be answered.

  Attributes:
    prompt: Token ids.
    sampling: The choice of tokens; the seed is always given.
    goes_on_with: Tokens that follow the answer in a second turn of a chat; none if there is none.
  """

  prompt: tuple[int, ...]
  sampling: SamplingParams
  goes_on_with: tuple[int, ...] = ()

  def request(self, name: str) -> Request:
    """A request for it under a name, which is that of a chat too where it goes on."""
    return Request(name, self.prompt, self.sampling, session=name if self.goes_on_with else None)

  def next_turn(self, answer: Completion) -> 'Wish':
    """The wish of the second turn, behind the answer to the first."""
    return Wish((*self.prompt, *answer.token_ids, *self.goes_on_with), self.sampling)


@dataclasses.dataclass(frozen=True)
class Visit:
  """A user: what they want, when they come, and when they want no more.

  Attributes:
    name: The request's id.
    wish: Their question.
    after_s: Seconds after the wave began.
    cancels_after: Deltas that they read before they cancel; 0 before the first, None if they never do.
    in_asyncio: Whether they wait in asyncio.
  """

  name: str
  wish: Wish
  after_s: float
  cancels_after: int | None
  in_asyncio: bool

  @property
  def request(self) -> Request:
    """The request to submit."""
    return self.wish.request(self.name)

  def next_turn(self, answer: Completion) -> 'Visit | None':
    """The visit that follows an answer, if one does and the context has room for it."""
    if not self.wish.goes_on_with or not answer.served:
      return None
    wish = self.wish.next_turn(answer)
    if len(wish.prompt) >= MODEL.context_len:
      return None
    return dataclasses.replace(self, name=f'{self.name}-next', wish=wish, after_s=0.0)


def draw_wish(rng: random.Random) -> Wish:
  """A prompt of any length that the context has room for, and any way of choosing tokens."""
  length = rng.choice((1, 3, 4, 9, 17, 33, 48, rng.randint(1, 80)))
  sampling: dict = {
    'max_tokens': rng.choice((1, 2, 5, 8, 12, 24)),
    'seed': rng.randrange(2**53),
    'ignore_eos': rng.random() < 0.5,
    'n': rng.choice((1, 1, 1, 1, 2, 3)),
    'logprobs': rng.choice((None, None, 0, 2)),
  }
  if rng.random() < 0.6:
    sampling |= {
      'temperature': rng.choice((0.5, 1.0, 1.5)),
      'top_k': rng.choice((0, 0, 5, 40)),
      'top_p': rng.choice((1.0, 1.0, 0.9)),
      'min_p': rng.choice((0.0, 0.0, 0.05)),
    }
  if rng.random() < 0.2:
    sampling |= {'repetition_penalty': 1.2, 'presence_penalty': 0.5, 'frequency_penalty': 0.3}
  goes_on = tuple(rng.choices(_WORDS, k=rng.randint(1, 6))) if sampling['n'] == 1 and rng.random() < 0.15 else ()
  return Wish(tuple(rng.choices(_WORDS, k=length)), SamplingParams(**sampling), goes_on)


def cut_short(rng: random.Random, wish: Wish, answer: Completion) -> Wish:
  """The same wish, to end with something that its answer says: a text, or a token."""
  tokens = answer.token_ids
  place = rng.randrange(len(tokens))
  text = tokenizer().decode(tokens[place : place + rng.randint(1, 4)])
  if text and rng.random() < 0.7:
    ends: dict = {'stop': (text, 'never said')}
  else:
    ends = {'stop_token_ids': (tokens[place],)}
  return dataclasses.replace(wish, sampling=dataclasses.replace(wish.sampling, **ends), goes_on_with=())


def draw_visits(rng: random.Random, name: str, wishes: list[Wish], count: int, cancelling: float) -> list[Visit]:
  """So many users of a wave, of whom this share cancels.

  Args:
    rng: The source of chance.
    name: The beginning of their ids.
    wishes: Wishes to choose from.
    count: The number of users.
    cancelling: The share of them that cancels, from 0 to 1.
  """
  in_asyncio = rng.random() < 0.5
  within_s = rng.choice((0.0, 0.05, 0.3))
  return [
    Visit(
      f'{name}-{index}',
      rng.choice(wishes),
      rng.uniform(0.0, within_s),
      rng.choice((0, 0, 1, 1, 2, 5)) if rng.random() < cancelling else None,
      in_asyncio,
    )
    for index in range(count)
  ]
