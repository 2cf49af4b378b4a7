"""Requests and what comes back: sampling parameters, completions, latency limits."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal

from pdjax.types.checks import check_list, check_seed, check_text, check_token_ids, is_number

FinishReason = Literal['stop', 'length', 'cancelled', 'rejected', 'error']
SERVED = ('stop', 'length')  # reasons of a request that got what it asked for

_INT32 = 2**31  # what is kept on the device has 32 bits
_FLOAT32 = (2 - 2**-23) * 2.0**127
_NUMBERS = ('temperature', 'top_p', 'min_p', 'repetition_penalty', 'presence_penalty', 'frequency_penalty')
_MASK64 = 2**64 - 1
_LEAST_REPETITION = 1e-3  # a penalty beyond it, or beyond its inverse, may overflow a logit

MAX_STOP_TOKENS = 8  # stop ids kept per sequence on the device, the model's end-of-sequence ids included
MAX_SAMPLES = 1024  # of one prompt; all decode on one worker at once
MAX_STOP_CHARS = 16_384  # of all stop strings of a request together: a table of as many rows finds them
MAX_LOGPROBS = 20  # likeliest tokens that can be told with each generated one


@dataclasses.dataclass(frozen=True, slots=True)
class SamplingParams:
  """The choice of the tokens of one request, and its end.

  Logits go through the penalties, then `temperature`, `top_k`, `top_p` and `min_p`, in this order.

  Attributes:
    max_tokens: Most tokens to generate, at least one.
    temperature: 0, or less than 1e-5, takes the likeliest token; above it, logits are divided by it and sampled.
    top_k: Sample among the k likeliest tokens only, and those as likely as the last of them; 0 means all.
    top_p: Sample among the fewest likeliest tokens whose probabilities reach this sum (nucleus sampling,
      Holtzman et al. 2020), and those as likely as the last of them; 1 means all. Applied after `top_k`.
    min_p: Sample among the tokens at least this share as probable as the likeliest (Nguyen et al. 2024); 0 means all.
    repetition_penalty: Divides the positive logits of tokens in the prompt or the output by this, and multiplies the
      negative ones (Keskar et al. 2019); 1 changes nothing, more discourages repetition.
    presence_penalty: Taken off the logits of tokens in the output.
    frequency_penalty: Taken off the logits of tokens in the output, once for each time they are there.
    seed: Fixes the request's random numbers, whatever else is in its batch. None draws one when the request comes, see
      `Request.seeded`; its completion and the log tell which.
    stop: Texts that end the request: the first of them to be complete, and what follows it, is not part of the text,
      while the tokens run up to the one that completed it.
    stop_token_ids: Tokens that end the request, besides the model's own end-of-sequence tokens.
    ignore_eos: Go on past the model's end-of-sequence tokens (`stop` and `stop_token_ids` still count).
    logprobs: Tell with each token its log probability and those of so many likeliest tokens, at most 20: of the
      model's own distribution, before penalties, temperature and cuts. None tells nothing.
    n: Samples of the prompt, which is computed once, see `Request.samples`.

  Raises:
    ValueError: if a value is out of range or of another kind.
  """

  max_tokens: int = 128
  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  seed: int | None = None
  stop_token_ids: tuple[int, ...] = ()
  ignore_eos: bool = False
  min_p: float = 0.0
  repetition_penalty: float = 1.0
  presence_penalty: float = 0.0
  frequency_penalty: float = 0.0
  stop: tuple[str, ...] = ()
  logprobs: int | None = None
  n: int = 1

  def __post_init__(self):
    for name in ('max_tokens', 'top_k', 'n', 'logprobs', 'seed'):  # found later, it would break the step of others
      count = getattr(self, name)
      left_out = count is None and name in ('logprobs', 'seed')
      if not left_out and (not hasattr(count, '__index__') or isinstance(count, bool)):
        raise ValueError(f'{name} is {count!r}, expected an integer.')
    for name in _NUMBERS:
      if not is_number(getattr(self, name)):
        raise ValueError(f'{name} is {getattr(self, name)!r}, expected a number.')
    if self.max_tokens >= _INT32:
      raise ValueError(f'max_tokens is {self.max_tokens}, expected a count below 2**31; ask for fewer.')
    if self.max_tokens < 1:
      raise ValueError(f'max_tokens is {self.max_tokens}, expected at least 1; ask for one token or leave it out.')
    if not 0 <= float(self.temperature) <= _FLOAT32:
      raise ValueError(f'temperature is {self.temperature}, expected 0 (greedy) or a positive number below 3.4e38.')
    if not 0 <= self.top_k < _INT32:
      raise ValueError(f'top_k is {self.top_k}, expected 0 (all tokens) or a positive count below 2**31.')
    if not 0 < self.top_p <= 1:
      raise ValueError(f'top_p is {self.top_p}, expected a number above 0 and at most 1.')
    if not 0 <= self.min_p <= 1:
      raise ValueError(f'min_p is {self.min_p}, expected a number from 0 (all tokens) to 1.')
    if not _LEAST_REPETITION <= self.repetition_penalty <= 1 / _LEAST_REPETITION:
      raise ValueError(
        f'repetition_penalty is {self.repetition_penalty}, expected a number from {_LEAST_REPETITION} to '
        f'{1 / _LEAST_REPETITION:g}; 1 changes nothing.'
      )
    for name in ('presence_penalty', 'frequency_penalty'):
      if not -2 <= getattr(self, name) <= 2:
        raise ValueError(f'{name} is {getattr(self, name)}, expected a number from -2 to 2; 0 changes nothing.')
    if self.seed is not None:
      check_seed(self.seed, 'seed')
    if not isinstance(self.ignore_eos, bool):
      raise ValueError(f'ignore_eos is {self.ignore_eos!r}, expected True or False.')
    stop: object = self.stop
    if isinstance(stop, str):
      raise ValueError(f'stop is the text {stop!r}, expected a tuple of texts; write ({stop!r},).')
    check_list(stop, 'stop', 'texts')
    if not all(isinstance(text, str) for text in self.stop):
      raise ValueError(f'stop is {self.stop!r}, expected a tuple of texts; for token ids use stop_token_ids.')
    for text in self.stop:
      check_text(text, 'a stop string')
    if (chars := sum(map(len, self.stop))) > MAX_STOP_CHARS:
      raise ValueError(f'stop has {chars} characters, expected at most {MAX_STOP_CHARS} in all; shorten its texts.')
    if '' in self.stop:
      raise ValueError('stop has an empty text, which would end the request before it begins; leave it out.')
    check_token_ids(self.stop_token_ids, 'stop_token_ids')
    if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
      raise ValueError(
        f"logprobs is {self.logprobs}, expected 0 (the token's own) to {MAX_LOGPROBS} likeliest tokens, or None."
      )
    if not 1 <= self.n <= MAX_SAMPLES:
      raise ValueError(f'n is {self.n}, expected 1 to {MAX_SAMPLES} samples; split a request that wants more.')

  @property
  def penalises(self) -> bool:
    """Whether tokens seen before count."""
    return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


@dataclasses.dataclass(frozen=True, slots=True)
class SLO:
  """Latency limits of one request, in milliseconds; None leaves a figure free, and an infinite limit is None.

  Raises:
    ValueError: if a limit is not positive, or NaN.
  """

  ttft_ms: float | None = None
  tpot_ms: float | None = None
  e2el_ms: float | None = None

  def __post_init__(self):
    for field in dataclasses.fields(self):
      limit = getattr(self, field.name)
      if limit is not None and not (is_number(limit) and limit > 0):
        raise ValueError(f'{field.name} is {limit}, expected a positive number of milliseconds.')
      if limit == math.inf:
        object.__setattr__(self, field.name, None)

  @classmethod
  def parse(cls, text: str) -> 'SLO':
    """Read limits written like `'ttft:500 tpot:50'` (milliseconds).

    Raises:
      ValueError: if a name or number is not understood.
    """
    names = [field.name.removesuffix('_ms') for field in dataclasses.fields(cls)]
    limits = {}
    for part in text.replace(',', ' ').split():
      name, _, value = part.partition(':')
      try:
        limits[f'{name}_ms'] = float(value)
      except ValueError:
        raise ValueError(f'goodput limit {part!r} is not of the form name:milliseconds, e.g. ttft:500.') from None
      if name not in names:
        raise ValueError(f'goodput limit {name!r} is unknown; the names are {", ".join(names)}.')
    return cls(**limits)


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
  """One prompt to be continued.

  Attributes:
    id: A name unique within the run.
    prompt: Token ids, any sequence of them; a simulation asks only for its length.
    sampling: The choice of its tokens, and its end.
    arrival_s: Seconds after the start of the run at which it arrives.
    slo: Latency limits of its own, if any.
    session: The chat it belongs to, if any.
    sample_of: The request that it is a further sample of, if it is one.
    end_token_ids: Tokens that end it besides the model's own, unless `sampling.ignore_eos`: for a chat, what its
      template puts behind an answer.

  Raises:
    ValueError: if the prompt is empty or no sequence, the id or the session is no text that UTF-8 can hold, the arrival
      time is negative or infinite, `end_token_ids` are no token ids, or `sampling` or `slo` is of another kind.
  """

  id: str
  prompt: Sequence[int]
  sampling: SamplingParams = SamplingParams()
  arrival_s: float = 0.0
  slo: SLO | None = None
  session: str | None = None
  sample_of: str | None = None
  end_token_ids: tuple[int, ...] = ()

  def __post_init__(self):
    if not isinstance(self.id, str):
      raise ValueError(f'the id of a request is {self.id!r}, expected text.')
    check_text(self.id, 'the id of a request')
    prompt: object = self.prompt
    if isinstance(prompt, str):
      raise ValueError(f'request {self.id!r} has the text {prompt[:40]!r} as its prompt; tokenize it first.')
    if not hasattr(prompt, '__len__'):
      raise ValueError(f'request {self.id!r} has the prompt {prompt!r:.80}, expected a sequence of token ids.')
    if len(self.prompt) == 0:
      raise ValueError(f'request {self.id!r} has an empty prompt, expected at least one token; give it some text.')
    for name, kind, expected in (
      ('sampling', SamplingParams, 'SamplingParams(...)'),
      ('slo', SLO | None, 'SLO(...) or None'),
      ('session', str | None, 'a text or None'),
    ):
      if not isinstance(getattr(self, name), kind):
        raise ValueError(f'request {self.id!r} has {name}={getattr(self, name)!r:.80}, expected {expected}.')
    if self.session is not None:
      check_text(self.session, 'the session of a request')
    check_token_ids(self.end_token_ids, 'end_token_ids')
    if not (is_number(self.arrival_s) and self.arrival_s >= 0 and math.isfinite(self.arrival_s)):
      raise ValueError(f'request {self.id!r} arrives at {self.arrival_s} s, expected 0 or later.')

  @property
  def prompt_len(self) -> int:
    """Tokens in the prompt."""
    return len(self.prompt)

  def stop_tokens(self, eos_token_ids: Sequence[int]) -> tuple[int, ...]:
    """The tokens that end it, each once, in a model that ends its sequences with these."""
    ends = () if self.sampling.ignore_eos else (*eos_token_ids, *self.end_token_ids)
    return tuple(sorted({*self.sampling.stop_token_ids, *ends}))

  def token_limit(self, context_len: int, output_len: Callable[[str], int | None] = lambda request: None) -> int:
    """Most tokens it may generate: `max_tokens`, or what a context leaves; the last one needs no place in it.

    Args:
      context_len: Tokens that the model's context holds.
      output_len: Gives a request's true length by its id, None where it has none; a sample of which nothing is known
        is as long as its request.
    """
    limit = min(self.sampling.max_tokens, context_len - self.prompt_len + 1)
    true_len = output_len(self.id)
    if true_len is None and self.sample_of is not None:
      true_len = output_len(self.sample_of)
    return limit if true_len is None else min(limit, true_len)

  def seeded(self, run_seed: int, number: int) -> 'Request':
    """The request with a seed of its own, if it has none: drawn from the run's seed and its number in the run.

    Args:
      run_seed: The seed of the run, `ServingConfig.seed`.
      number: Its number in the run, counted from 0 in the order of arrival, or of a requests file by row.
    """
    if self.sampling.seed is not None:
      return self
    seed = drawn_seed(run_seed, number)
    return dataclasses.replace(self, sampling=dataclasses.replace(self.sampling, seed=seed))

  def samples(self) -> tuple['Request', ...]:
    """The request as `sampling.n` requests of one sample each.

    The first keeps id and seed; the others are named `id#1`, `id#2` and so on, and each has a seed of its own, made
    from that of the first (none while it has none).
    """
    if self.sampling.n == 1:
      return (self,)
    first = dataclasses.replace(self, sampling=dataclasses.replace(self.sampling, n=1))
    seed = self.sampling.seed
    others = (
      dataclasses.replace(
        first,
        id=f'{self.id}#{index}',
        sampling=dataclasses.replace(first.sampling, seed=None if seed is None else _mixed(seed, index)),
        sample_of=self.id,
      )
      for index in range(1, self.sampling.n)
    )
    return (first, *others)


def drawn_seed(run_seed: int, number: int) -> int:
  """The seed of a request that comes without one, see `Request.seeded`."""
  return _mixed(run_seed, number + 1)


def _mixed(seed: int, index: int) -> int:
  """A seed from a seed: the `index`-th number of SplitMix64 (Steele et al. 2014), begun at the seed mixed once.

  Were it begun at the seed itself, the samples of one request could be those of another with a neighbouring seed.
  """

  def mix(x: int) -> int:
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK64
    return x ^ (x >> 31)

  golden = 0x9E3779B97F4A7C15
  start = mix((int(seed) + golden) & _MASK64)  # a NumPy integer would overflow
  return mix((start + index * golden) & _MASK64) >> 11  # of 53 bits, which every reader of JSON keeps


@dataclasses.dataclass(frozen=True, slots=True)
class TokenLogprob:
  """The log probability of a token in the model's own distribution, before penalties, temperature and cuts.

  Attributes:
    logprob: Natural logarithm of its probability.
    top: The likeliest tokens with theirs, likeliest first, as many as were asked for.
  """

  logprob: float
  top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Completion:
  """The outcome of one request, or of one of its samples.

  Attributes:
    request: The request; with several samples, the one of this sample alone.
    token_ids: The generated tokens, a stop token or what completed a stop string included.
    finish_reason: The reason it ended; `rejected` and `error` come with a message in `error`.
    error: The error it ended with, or None.
    text: The text that the tokens add to the prompt's, special tokens left out, up to a stop string; None where there
      is no tokenizer. Of a request that was cancelled or failed, as much as was sure.
    token_times_s: The time each token was delivered, seconds after the start of the run.
    logprobs: The log probabilities of each token, if they were asked for.
  """

  request: Request
  token_ids: tuple[int, ...]
  finish_reason: FinishReason
  error: str | None = None
  text: str | None = None
  token_times_s: tuple[float, ...] = ()
  logprobs: tuple[TokenLogprob, ...] = ()

  @classmethod
  def unfinished(cls, request: Request) -> 'Completion':
    """The completion of a request that had not ended when its run did."""
    return cls(request, (), 'error', error='the run ended before it did.')

  @property
  def served(self) -> bool:
    """Whether the request got what it asked for."""
    return self.finish_reason in SERVED
