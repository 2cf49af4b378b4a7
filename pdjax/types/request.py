"""What a user asks for and what comes back: requests, sampling parameters, completions, latency limits."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

FinishReason = Literal['stop', 'length', 'cancelled', 'rejected', 'error']

_INT32 = 2**31  # what is kept on the device has 32 bits

MAX_STOP_TOKENS = 8  # stop ids kept per sequence on the device, the model's end-of-sequence ids included


@dataclasses.dataclass(frozen=True, slots=True)
class SamplingParams:
  """How the tokens of one request are chosen, and when it ends.

  Attributes:
    max_tokens: Most tokens to generate, at least one.
    temperature: 0, or less than 1e-5, takes the likeliest token; above it, logits are divided by it and sampled.
    top_k: Sample among the k likeliest tokens only; 0 means all.
    top_p: Sample among the fewest likeliest tokens whose probabilities reach this sum (nucleus sampling,
      Holtzman et al. 2020); 1 means all. Applied after `top_k`.
    seed: Fixes the request's random numbers, whatever else is in its batch.
    stop_token_ids: Tokens that end the request, besides the model's own end-of-sequence tokens.
    ignore_eos: Go on past the model's end-of-sequence tokens (`stop_token_ids` still count).

  Raises:
    ValueError: if a value is out of range.
  """

  max_tokens: int = 128
  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  seed: int = 0
  stop_token_ids: tuple[int, ...] = ()
  ignore_eos: bool = False

  def __post_init__(self):
    if self.max_tokens >= _INT32:
      raise ValueError(f'max_tokens is {self.max_tokens}, expected a count below 2**31; ask for fewer.')
    if self.max_tokens < 1:
      raise ValueError(f'max_tokens is {self.max_tokens}, expected at least 1; ask for one token or leave it out.')
    if not (self.temperature >= 0 and math.isfinite(self.temperature)):
      raise ValueError(f'temperature is {self.temperature}, expected 0 (greedy) or a positive number.')
    if not 0 <= self.top_k < _INT32:
      raise ValueError(f'top_k is {self.top_k}, expected 0 (all tokens) or a positive count below 2**31.')
    if not 0 < self.top_p <= 1:
      raise ValueError(f'top_p is {self.top_p}, expected a number above 0 and at most 1.')
    if not 0 <= self.seed < 2**63:
      raise ValueError(f'seed is {self.seed}, expected an integer from 0 to 2**63 - 1.')
    for token in self.stop_token_ids:
      if not 0 <= token < _INT32:
        raise ValueError(f'stop_token_ids has {token}, expected token ids from 0 to 2**31 - 1.')


@dataclasses.dataclass(frozen=True, slots=True)
class SLO:
  """Latency limits of one request, in milliseconds; None leaves a figure free.

  Raises:
    ValueError: if a limit is not positive.
  """

  ttft_ms: float | None = None
  tpot_ms: float | None = None
  e2el_ms: float | None = None

  def __post_init__(self):
    for field in dataclasses.fields(self):
      limit = getattr(self, field.name)
      if limit is not None and not limit > 0:
        raise ValueError(f'{field.name} is {limit}, expected a positive number of milliseconds.')

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
    sampling: How tokens are chosen and when it ends.
    arrival_s: Seconds after the start of the run at which it arrives.
    slo: Latency limits of its own, if any.
    session: The chat it belongs to, if any.

  Raises:
    ValueError: if the prompt is empty or the arrival time negative or infinite.
  """

  id: str
  prompt: Sequence[int]
  sampling: SamplingParams = SamplingParams()
  arrival_s: float = 0.0
  slo: SLO | None = None
  session: str | None = None

  def __post_init__(self):
    prompt: object = self.prompt
    if isinstance(prompt, str):
      raise ValueError(f'request {self.id!r} has the text {prompt[:40]!r} as its prompt; tokenize it first.')
    if len(self.prompt) == 0:
      raise ValueError(f'request {self.id!r} has an empty prompt, expected at least one token; give it some text.')
    if not (self.arrival_s >= 0 and math.isfinite(self.arrival_s)):
      raise ValueError(f'request {self.id!r} arrives at {self.arrival_s} s, expected 0 or later.')

  @property
  def prompt_len(self) -> int:
    """Tokens in the prompt."""
    return len(self.prompt)

  def token_limit(self, context_len: int) -> int:
    """Most tokens it may generate: `max_tokens`, or what a context leaves; the last one needs no place in it."""
    return min(self.sampling.max_tokens, context_len - self.prompt_len + 1)


@dataclasses.dataclass(frozen=True, slots=True)
class Completion:
  """What became of one request.

  Attributes:
    request: The request.
    token_ids: The generated tokens, a stop token included.
    finish_reason: Why it ended; `rejected` and `error` come with a message in `error`.
    error: What went wrong, or None.
    text: The tokens as text without special tokens; None where there is no tokenizer.
    token_times_s: When each token was delivered, seconds after the start of the run.
  """

  request: Request
  token_ids: tuple[int, ...]
  finish_reason: FinishReason
  error: str | None = None
  text: str | None = None
  token_times_s: tuple[float, ...] = ()
