"""Requests and what comes back: sampling parameters, completions, latency limits."""

import array
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Annotated, Any, ClassVar, Literal

from pdjax.types.checked import Positive, Seed, TokenId, check_fields
from pdjax.types.checks import check_text
from pdjax.types.fitting import Fits, Misfit, Must

FinishReason = Literal['stop', 'length', 'cancelled', 'rejected', 'error']
SERVED = ('stop', 'length')  # reasons of a request that got what it asked for

_INT32 = 2**31  # what is kept on the device has 32 bits
_FLOAT32 = (2 - 2**-23) * 2.0**127
_MASK64 = 2**64 - 1
_LEAST_REPETITION = 1e-3  # a penalty beyond it, or beyond its inverse, may overflow a logit

MAX_STOP_TOKENS = 8  # stop ids kept per sequence on the device, the model's end-of-sequence ids included
MAX_SAMPLES = 1024  # of one prompt; all decode on one worker at once
MAX_STOP_CHARS = 16_384  # of all stop strings of a request together: a table of as many rows finds them
MAX_LOGPROBS = 20  # likeliest tokens that can be told with each generated one

_TEMPERATURE = Must(lambda value: 0 <= float(value) <= _FLOAT32, '0 (greedy) or a positive number below 3.4e38')
_REPETITION = Must(
  lambda value: _LEAST_REPETITION <= value <= 1 / _LEAST_REPETITION,
  f'a number from {_LEAST_REPETITION} to {1 / _LEAST_REPETITION:g}; 1 changes nothing',
)
_LOGPROBS = Must(lambda count: 0 <= count <= MAX_LOGPROBS, f"0 (the token's own) to {MAX_LOGPROBS} likeliest tokens")
_SAMPLES = Must(lambda count: 1 <= count <= MAX_SAMPLES, f'1 to {MAX_SAMPLES} samples; split a request that wants more')
_MAX_TOKENS = (
  Must(lambda count: count >= 1, 'at least 1; ask for one token or leave it out'),
  Must(lambda count: count < _INT32, 'a count below 2**31; ask for fewer'),
)
_Penalty = Annotated[float, Must(lambda value: -2 <= value <= 2, 'a number from -2 to 2; 0 changes nothing')]
_Limit = Annotated[float, Must(lambda value: value > 0, 'a positive number of milliseconds')]


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

  _said: ClassVar[str] = '{kind}.{field} is {value}'

  max_tokens: Annotated[int, _MAX_TOKENS[0], _MAX_TOKENS[1]] = 128
  temperature: Annotated[float, _TEMPERATURE] = 0.0
  top_k: Annotated[int, Must(lambda k: 0 <= k < _INT32, '0 (all tokens) or a positive count below 2**31')] = 0
  top_p: Annotated[float, Must(lambda p: 0 < p <= 1, 'a number above 0 and at most 1')] = 1.0
  seed: Seed | None = None
  stop_token_ids: tuple[TokenId, ...] = ()
  ignore_eos: bool = False
  min_p: Annotated[float, Must(lambda p: 0 <= p <= 1, 'a number from 0 (all tokens) to 1')] = 0.0
  repetition_penalty: Annotated[float, _REPETITION] = 1.0
  presence_penalty: _Penalty = 0.0
  frequency_penalty: _Penalty = 0.0
  stop: tuple[str, ...] = ()
  logprobs: Annotated[int, _LOGPROBS] | None = None
  n: Annotated[int, _SAMPLES] = 1

  def __post_init__(self):
    check_fields(self)
    if self.stop:
      for text in self.stop:
        check_text(text, 'a stop string')
      if (chars := sum(map(len, self.stop))) > MAX_STOP_CHARS:
        raise ValueError(f'stop has {chars} characters, expected at most {MAX_STOP_CHARS} in all; shorten its texts.')
      if '' in self.stop:
        raise ValueError('stop has an empty text, which would end the request before it begins; leave it out.')

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

  _said: ClassVar[str] = '{kind}.{field} is {value}'

  ttft_ms: _Limit | None = None
  tpot_ms: _Limit | None = None
  e2el_ms: _Limit | None = None

  def __post_init__(self):
    check_fields(self)
    for field in dataclasses.fields(self):
      if getattr(self, field.name) == math.inf:
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


_NOTHING = object()
_SEQUENCES: set[type] = set()  # without a dtype, whose tokens are not looked at: what holds of one holds of all
_walked: Any = _NOTHING  # the prompt that was looked through last: copies of a request have the same one


def _fit_prompt(prompt: Any) -> Sequence[int]:
  """A prompt; tokens of tuples and lists are looked at, other sequences may not have theirs yet."""
  global _walked
  if prompt is _walked:
    return prompt
  if isinstance(prompt, tuple | list):
    try:
      array.array('I', prompt)  # integers of 32 bits, at a twentieth of what a loop takes
    except (TypeError, OverflowError):
      place = next(index for index, token in enumerate(prompt) if not _is_token(token))
      raise Misfit(prompt[place], 'a token id from 0 to 2**31 - 1', f'[{place}]') from None
    if not prompt:
      raise Misfit(prompt, 'at least one token', remedy='give it some text')
    _walked = prompt if isinstance(prompt, tuple) else _NOTHING
    return prompt
  if type(prompt) in _SEQUENCES and len(prompt):
    return prompt
  if isinstance(prompt, str):
    raise Misfit(prompt, 'a sequence of token ids', remedy='tokenize it first')
  dtype = getattr(prompt, 'dtype', None)
  if (
    isinstance(prompt, bytes | bytearray | memoryview | Mapping | Set | type)
    or not hasattr(prompt, '__getitem__')
    or (dtype is not None and (getattr(dtype, 'kind', '') not in tuple('iu') or getattr(prompt, 'ndim', 1) != 1))
    or not hasattr(prompt, '__len__')
  ):
    raise Misfit(prompt, 'a sequence of token ids')
  if len(prompt) == 0:
    raise Misfit(prompt, 'at least one token', remedy='give it some text')
  if dtype is None:
    _SEQUENCES.add(type(prompt))
  return prompt


def _is_token(value: Any) -> bool:
  return hasattr(value, '__index__') and 0 <= value < _INT32


TokenIds = Annotated[Sequence[int], Fits(_fit_prompt)]  # of a prompt


Name = Annotated[str, Must(lambda text: text != '', 'a text that is not empty; None is nobody')]
Priority = Annotated[int, Must(lambda value: -_INT32 <= value < _INT32, 'an integer of 32 bits; lower goes first')]
BlockHash = Annotated[int, Must(lambda value: 0 <= value < 2**64, 'an id from 0 to 2**64 - 1')]


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
    tenant: The user or group that it is served for, if that is told.
    cache_salt: Requests of another salt share no cached pages with it; None takes `tenant`.
    block_hashes: Of a simulated request, whose tokens nobody knows, an id for each block of its prompt; those with
      equal ids, up to the first that is unlike, begin alike. A longer prompt shares nothing behind its last block.
    block_size: Tokens of each of these blocks, of which the last may be cut short.
    cache_prefix: Whether it uses what is cached of its prompt, and leaves its own pages to others
      (`ServingConfig.prefix_cache`).
    class_name: The kind of traffic it is of, such as 'chat', if that is told.
    priority: Its rank among others, for policies that heed it: lower goes first.
    deadline_s: Seconds after its arrival by which its last token is to be there, if that matters; a report counts who
      was in time.

  Raises:
    ValueError: if the prompt is empty or no sequence, an id, session, tenant, salt or class is no text that UTF-8 can
      hold, the arrival time is negative or infinite, the deadline is not positive, `prompt` or `end_token_ids` are no
      token ids, `block_hashes` are more than the prompt has, or `sampling` or `slo` is of another kind.
  """

  _said: ClassVar[str] = 'request {name} has {field}={value}'

  id: str
  prompt: TokenIds
  sampling: SamplingParams = SamplingParams()
  arrival_s: Annotated[float, Must(lambda value: 0 <= value < math.inf, '0 or later, in seconds')] = 0.0
  slo: SLO | None = None
  session: str | None = None
  sample_of: str | None = None
  end_token_ids: tuple[TokenId, ...] = ()
  tenant: Name | None = None
  cache_salt: Name | None = None
  cache_prefix: bool = True
  block_hashes: tuple[BlockHash, ...] = ()
  block_size: Annotated[int, Must(lambda size: size >= 2, 'at least 2 tokens')] | None = None
  class_name: Name | None = None
  priority: Priority = 0
  deadline_s: Positive | None = None

  def __post_init__(self):
    check_fields(self)
    if (self.block_size is None) == bool(self.block_hashes):
      raise ValueError(
        f'request {self.id!r} has {len(self.block_hashes)} block_hashes and block_size={self.block_size}; give both or '
        'neither.'
      )
    if self.block_size is not None and (len(self.block_hashes) - 1) * self.block_size >= len(self.prompt):
      raise ValueError(
        f'request {self.id!r} has {len(self.block_hashes)} block_hashes of {self.block_size} tokens, which are more '
        f'than its prompt of {len(self.prompt)}; leave out those behind it.'
      )
    if not self.id.isascii():
      check_text(self.id, 'the id of a request')
    if self.session is self.tenant is self.cache_salt is self.class_name is None:
      return
    for name in ('session', 'tenant', 'cache_salt', 'class_name'):
      if (text := getattr(self, name)) is not None:
        check_text(text, f'the {name} of a request')

  @property
  def prompt_len(self) -> int:
    """Tokens in the prompt."""
    return len(self.prompt)

  @property
  def salt(self) -> str:
    """The text that keeps its cached pages apart from those of others; empty for those that all share."""
    return self.cache_salt if self.cache_salt is not None else self.tenant or ''

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
    cached_tokens: Tokens of the prompt that were cached, and so not computed; of several samples the one that carried
      the prompt has them.
  """

  request: Request
  token_ids: tuple[int, ...]
  finish_reason: FinishReason
  error: str | None = None
  text: str | None = None
  token_times_s: tuple[float, ...] = ()
  logprobs: tuple[TokenLogprob, ...] = ()
  cached_tokens: int = 0

  @classmethod
  def unfinished(cls, request: Request) -> 'Completion':
    """The completion of a request that had not ended when its run did."""
    return cls(request, (), 'error', error='the run ended before it did.')

  @property
  def served(self) -> bool:
    """Whether the request got what it asked for."""
    return self.finish_reason in SERVED
