"""Made-up workloads: Poisson, bursty and constant arrivals, a closed loop, and chats of several turns.

A workload is data; `arrivals` makes its requests, always the same for the same fields. Arrival times, prompt lengths
and output lengths come from separate streams of random numbers, so that another rate meets the same requests.
"""

import bisect
import dataclasses
import enum
import math
from collections.abc import Iterable, Sequence
from typing import Annotated, ClassVar, Self

import numpy as np

from pdjax.host import check_room
from pdjax.types.checked import SOME, Count, Index, check_fields
from pdjax.types.fitting import Must, Remedy
from pdjax.types.request import SLO, Request, SamplingParams, TokenIds
from pdjax.workload.arrivals import Chat, Chats, ChatTurn, ClosedLoop, Listed, Thinking, Users
from pdjax.workload.lengths import Fixed, Length, Lognormal
from pdjax.workload.tokens import RandomTokens
from pdjax.workload.workload import WorkloadContext

_FEW = 100_000  # for which there is memory anywhere
_REQUEST_BYTES = 600  # of a request, its sampling and its prompt, on 64-bit CPython
_NO_TEXTS = Remedy('prompts=None is random tokens')
_RATE = Must(lambda value: value > 0, 'a positive number, or inf for all at once')
_SHAPE = Must(
  lambda value: 0 < value < math.inf, 'a positive number; 1 is Poisson, and Constant has gaps that are all equal'
)
RateOf = Annotated[float, _RATE]  # of requests
BurstOf = Annotated[float, _SHAPE]  # of arrivals


class _Stream(enum.IntEnum):
  """The streams of random numbers that the workload's seed is split into."""

  GAPS = 0
  PROMPTS = 1
  OUTPUTS = 2
  REQUESTS = 3
  TURNS = 4
  SHARED = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sampled:
  """The fields of every made-up workload.

  Attributes:
    prompt: Tokens in a prompt of random tokens.
    output: Tokens that follow a prompt of random tokens. Only `output.upper` is told to the server, as
      `max_tokens`; where the request really ends stays with the arrivals.
    sampling: Temperature and the like. Every request has a seed of its own, made from the workload's. With random
      tokens, `max_tokens` and `ignore_eos` are set as `output` demands.
    slo: Latency limits of every request.
    seed: Fixes everything.
  """

  prompt: Length = Lognormal(median=256, sigma=0.8, high=2048)
  output: Length = Lognormal(median=64, sigma=0.6, high=512)
  sampling: SamplingParams = SamplingParams()
  slo: SLO | None = None
  seed: Index = 0

  def __post_init__(self):
    check_fields(self)

  @property
  def _name(self) -> str:
    return type(self).__name__

  def _rng(self, stream: _Stream) -> np.random.Generator:
    return np.random.default_rng((self.seed, stream))

  def _request_seed(self, index: int) -> int:
    words = np.random.SeedSequence((self.seed, _Stream.REQUESTS, index)).generate_state(1, np.uint64)
    return int(words[0] >> np.uint64(1))  # below 2**63

  def _random_sampling(self, index: int) -> SamplingParams:
    """The sampling of a request of random tokens: up to its true length, whatever the tokens are."""
    if self.sampling.stop_token_ids:
      raise ValueError(
        f'{self._name} has sampling.stop_token_ids={self.sampling.stop_token_ids} with prompts of random tokens, whose '
        'outputs end at lengths drawn from output; leave stop_token_ids empty or give text prompts.'
      )
    return dataclasses.replace(
      self.sampling, max_tokens=self.output.upper, ignore_eos=True, seed=self._request_seed(index)
    )

  def _check_room(self, field: str) -> None:
    """Raise ValueError if there is no memory for as many requests or chats: all are made before the first arrives."""
    count = getattr(self, field)
    if count > _FEW:
      check_room(f'{self._name} has {field}={count}, which', count * _REQUEST_BYTES, 'ask for fewer, in several runs')

  def _check_fits(self, prompt_len: int, max_tokens: int, context_len: int, what: str) -> None:
    if prompt_len + max_tokens > context_len:
      raise ValueError(
        f'{self._name} has {what} of up to {prompt_len} tokens and up to {max_tokens} more to generate, expected at '
        f'most {context_len} together, the context length; lower either.'
      )


def _seed_of(sampling: SamplingParams) -> int:
  """The seed of a request, which its prompt shares."""
  assert sampling.seed is not None
  return sampling.seed


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Independent(_Sampled):
  """Requests that have nothing to do with each other.

  Attributes:
    num_requests: Requests that come.
    prompts: Texts of users, in turn and over again, put through the chat template; then `prompt` and `output` do not
      count, and the model decides where an answer ends. None: random tokens.
  """

  num_requests: Count = 64
  prompts: Annotated[tuple[str, ...], SOME, _NO_TEXTS] | None = None

  @property
  def repeats(self) -> bool:
    """Whether prompts may begin alike: random ones do not."""
    return self.prompts is not None

  def _requests(
    self, context: WorkloadContext, arrivals_s: Iterable[float] | None = None
  ) -> tuple[list[Request], dict[str, int]]:
    """The requests and their true output lengths."""
    self._check_room('num_requests')
    times_s = [0.0] * self.num_requests if arrivals_s is None else arrivals_s
    return self._text_requests(context, times_s) if self.prompts else self._random_requests(context, times_s)

  def _random_requests(
    self, context: WorkloadContext, arrivals_s: Iterable[float]
  ) -> tuple[list[Request], dict[str, int]]:
    self._check_fits(self.prompt.upper, self.output.upper, context.context_len, 'prompts')
    prompt_rng, output_rng = self._rng(_Stream.PROMPTS), self._rng(_Stream.OUTPUTS)
    requests, output_lens = [], {}
    for index, arrival_s in enumerate(arrivals_s):
      sampling = self._random_sampling(index)
      prompt = RandomTokens(self.prompt.sample(prompt_rng), context.vocab_size, _seed_of(sampling))
      requests.append(Request(f'request-{index}', prompt, sampling, arrival_s, self.slo))
      output_lens[requests[-1].id] = self.output.sample(output_rng)
    return requests, output_lens

  def _text_requests(
    self, context: WorkloadContext, arrivals_s: Iterable[float]
  ) -> tuple[list[Request], dict[str, int]]:
    prompts = [context.encode(text) for text in self.prompts or ()]
    longest = max(len(prompt) for prompt in prompts)
    self._check_fits(longest, self.sampling.max_tokens, context.context_len, 'prompts')
    requests = []
    for index, arrival_s in enumerate(arrivals_s):
      sampling = dataclasses.replace(self.sampling, seed=self._request_seed(index))
      prompt, ends = prompts[index % len(prompts)], context.chat_end_ids
      requests.append(Request(f'request-{index}', prompt, sampling, arrival_s, self.slo, end_token_ids=ends))
    return requests, {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _OpenLoop(_Independent):
  """Requests that come at times of their own, the first at 0 s.

  Attributes:
    requests_per_s: Mean rate; infinite if all come at once.
  """

  requests_per_s: RateOf = 1.0
  max_concurrency: ClassVar[None] = None

  @property
  def request_rate(self) -> float:
    return self.requests_per_s

  def arrivals(self, context: WorkloadContext) -> Listed:
    self._check_room('num_requests')
    return self.listed(context, self.times_s(self.num_requests))

  def listed(self, context: WorkloadContext, times_s: Sequence[float]) -> Listed:
    """Its requests, at these times instead of its own."""
    return Listed(*self._requests(context, times_s))

  def lasting(self, seconds: float) -> Self:
    """The same with as many requests as come in so many seconds; as it is, if all come at once."""
    if math.isinf(self.requests_per_s):
      return self
    count = int(self.requests_per_s * seconds) + 16
    dataclasses.replace(self, num_requests=count)._check_room('num_requests')
    while (times_s := self.times_s(count))[-1] < seconds:
      count *= 2
    return dataclasses.replace(self, num_requests=bisect.bisect_left(times_s, seconds))

  def times_s(self, count: int) -> list[float]:
    """The times at which the first `count` of its requests come, however many there are to be."""
    return [0.0, *np.cumsum(self._gaps_s(self._rng(_Stream.GAPS), count - 1)).tolist()]

  def _gaps_s(self, rng: np.random.Generator, count: int) -> np.ndarray:
    raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Poisson(_OpenLoop):
  """Arrivals independent of each other: exponential gaps of mean `1 / requests_per_s`."""

  burstiness: ClassVar[float] = 1.0

  def _gaps_s(self, rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.exponential(1 / self.requests_per_s, count)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bursty(_OpenLoop):
  """Gamma gaps of mean `1 / requests_per_s`, whose deviation is `1 / sqrt(burstiness)` of their mean.

  Attributes:
    burstiness: Shape of the gamma distribution: 1 is Poisson, below it arrivals bunch, above it they even out.
  """

  burstiness: BurstOf = 0.5

  def _gaps_s(self, rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.gamma(self.burstiness, 1 / (self.burstiness * self.requests_per_s), count)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constant(_OpenLoop):
  """Arrivals at equal distances."""

  burstiness: ClassVar[None] = None

  def _gaps_s(self, rng: np.random.Generator, count: int) -> np.ndarray:
    return np.full(count, 1 / self.requests_per_s)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClosedLoopWorkload(_Independent):
  """A fixed number of users: each sends a request, waits for its end, thinks, and sends the next.

  Attributes:
    max_concurrency: Users, and so the most requests in flight.
    think_s: Seconds from the end of a request to the next one of the same user.
  """

  max_concurrency: Users = 8
  think_s: Thinking = 0.0
  request_rate: ClassVar[float] = math.inf
  burstiness: ClassVar[None] = None

  def arrivals(self, context: WorkloadContext) -> ClosedLoop:
    requests, output_lens = self._requests(context)
    return ClosedLoop(requests, self.max_concurrency, self.think_s, output_lens)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiTurn(_Sampled):
  """Chats of random tokens in which every prompt is the whole conversation so far; `Chats` says when one ends.

  Attributes:
    num_chats: Conversations.
    turns: Turns of a conversation, fewer if `max_context` is reached.
    prompt: Tokens of the first turn.
    user: Tokens that the user adds in every later turn.
    output: Tokens of an answer.
    think_s: Seconds from an answer to the next turn.
    max_concurrency: Most conversations at once; None if it does not matter.
    chats_per_s: Rate of a Poisson process that starts conversations; infinite if all are there from the beginning.
    max_context: Most tokens of a prompt and its answer together; None takes the model's context length.
    shared: Tokens with which all chats begin, before those of `prompt`: a system prompt.
  """

  num_chats: Count = 16
  turns: Length = Fixed(4)
  user: Length = Lognormal(median=64, sigma=0.8, high=512)
  think_s: Thinking = 0.0
  max_concurrency: Users | None = 8
  chats_per_s: RateOf = math.inf
  max_context: Count | None = None
  shared: Index = 0
  burstiness: ClassVar[None] = None

  @property
  def num_requests(self) -> int:
    """Requests if no conversation is cut short."""
    return sum(self.turn_counts())

  @property
  def request_rate(self) -> float | None:
    """Infinite if every turn waits for another; None if conversations start by themselves."""
    return math.inf if math.isinf(self.chats_per_s) else None

  def arrivals(self, context: WorkloadContext) -> Chats:
    gaps_s = self._rng(_Stream.GAPS).exponential(1 / self.chats_per_s, self.num_chats - 1)
    return self.chats(context, [0.0, *np.cumsum(gaps_s).tolist()], self.turn_counts())

  def chats(self, context: WorkloadContext, starts_s: Sequence[float], turn_counts: Sequence[int]) -> Chats:
    """Its conversations, begun at these times and of so many turns."""
    max_context = min(self.max_context or context.context_len, context.context_len)
    self._check_fits(self.shared + self.prompt.upper, self.output.upper, max_context, 'first turns')
    seed = int(self._rng(_Stream.SHARED).integers(2**63))
    begin = tuple(RandomTokens(self.shared, context.vocab_size, seed)) if self.shared else ()
    prompt_rng, output_rng = self._rng(_Stream.PROMPTS), self._rng(_Stream.OUTPUTS)
    chats, index = [], 0
    for chat, (start_s, num_turns) in enumerate(zip(starts_s, turn_counts, strict=True)):
      turns = []
      for turn in range(num_turns):
        length = (self.user if turn else self.prompt).sample(prompt_rng)
        sampling = self._random_sampling(index)
        user: TokenIds = RandomTokens(length, context.vocab_size, _seed_of(sampling))
        if begin and not turn:
          user = (*begin, *user)
        turns.append(ChatTurn(user, sampling, self.output.sample(output_rng)))
        index += 1
      chats.append(Chat(f'chat-{chat}', tuple(turns), start_s, self.slo))
    return Chats(chats, max_context, self.max_concurrency, self.think_s)

  def turn_counts(self) -> list[int]:
    """Turns of each conversation, if it is not cut short."""
    self._check_room('num_chats')
    rng = self._rng(_Stream.TURNS)
    return [self.turns.sample(rng) for _ in range(self.num_chats)]
