"""The plain loop: the whole sequence through NumPy again for every token. What every way of serving must equal."""

import functools

import jax
import numpy as np

from pdjax.model.checkpoint import RandomCheckpoint
from pdjax.model.sampling import Sampling, sample, stop_tokens
from pdjax.types import ModelSpec, Request
from tests.model.numpy_llama import NumpyLlama

sample = jax.jit(sample)


class Cached(RandomCheckpoint):
  """Random weights that are drawn once."""

  @functools.cache  # noqa: B019 -- a few tiny models live as long as the tests
  def tensor(self, name: str) -> np.ndarray:
    return super().tensor(name)


@functools.cache
def generate(model: ModelSpec, request: Request) -> tuple[tuple[int, ...], str]:
  """The tokens of a request served alone, and why it ends."""
  llama = NumpyLlama(Cached(model))
  params = request.sampling
  limit = min(params.max_tokens, model.context_len - request.prompt_len + 1)
  stops = stop_tokens(params, model.eos_token_ids)
  sampling = Sampling.stack([params], [limit], model.eos_token_ids, 1)
  tokens: list[int] = []
  while True:
    logits = llama.logits((*request.prompt, *tokens))[-1:].astype(np.float32)
    tokens.append(int(sample(logits, sampling, np.array([len(tokens)], np.int32))[0]))
    if tokens[-1] in stops:
      return tuple(tokens), 'stop'
    if len(tokens) == limit:
      return tuple(tokens), 'length'
