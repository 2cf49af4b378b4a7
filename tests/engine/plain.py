"""The plain loop: the whole sequence through NumPy again for every token. What every way of serving must equal."""

import dataclasses
import functools

import jax
import numpy as np

from pdjax.model.checkpoint import RandomCheckpoint
from pdjax.model.sampling import Sampling, sample
from pdjax.types import ModelSpec, Request, SamplingParams
from tests.model.numpy_llama import NumpyLlama
from tests.model.test_sampling import penalised
from tests.tiny import byte_tokenizer

sample = jax.jit(sample)


class Cached(RandomCheckpoint):
  """Random weights that are drawn once."""

  @functools.cache  # noqa: B019 -- a few tiny models live as long as the tests
  def tensor(self, name: str) -> np.ndarray:
    return super().tensor(name)


@dataclasses.dataclass(frozen=True)
class Answer:
  """The answer to a request: tokens, why they end, their text, and the log probabilities `[V]` at each of them."""

  tokens: tuple[int, ...]
  reason: str
  text: str
  logprobs: np.ndarray


EXACT = ('float32', 'float32')


@functools.cache
def answer(model: ModelSpec, request: Request, caches: tuple[str, str] = EXACT) -> Answer:
  """A request of one sample served alone, with nothing but NumPy between the weights and the logits to draw from.

  `caches` are the dtypes of the keys and values where it is prefilled and where it decodes.
  """
  llama = NumpyLlama(Cached(model), caches, request.prompt_len)
  params = request.sampling
  limit = min(params.max_tokens, model.context_len - request.prompt_len + 1)
  stops = request.stop_tokens(model.eos_token_ids)
  draws = SamplingParams(
    temperature=params.temperature, top_k=params.top_k, top_p=params.top_p, min_p=params.min_p, seed=params.seed
  )
  sampling = Sampling.stack([draws], [limit], [()], 1)
  tokens: list[int] = []
  logprobs = []
  while True:
    logits = llama.logits((*request.prompt, *tokens))[-1].astype(np.float32)
    logprobs.append(logits - np.log(np.exp(logits.astype(np.float64)).sum()))
    wanted = penalised(logits, request.prompt, tokens, params)
    tokens.append(int(sample(wanted[None], sampling, np.array([len(tokens)], np.int32)).tokens[0]))
    text = byte_tokenizer().decode(tokens)
    begins = [text.index(one) for one in params.stop if one in text]
    if begins or tokens[-1] in stops or len(tokens) == limit:
      reason = 'stop' if begins or tokens[-1] in stops else 'length'
      return Answer(tuple(tokens), reason, text[: min(begins, default=len(text))], np.stack(logprobs))


def generate(model: ModelSpec, request: Request, caches: tuple[str, str] = EXACT) -> tuple[tuple[int, ...], str]:
  """The tokens of a request served alone, and why it ends."""
  alone = answer(model, request, caches)
  return alone.tokens, alone.reason
