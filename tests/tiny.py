"""Tiny models and clusters that tests share; random weights, a few seconds to compile."""

import dataclasses
import functools

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from pdjax.config import ServingConfig
from pdjax.model.tokenizer import Tokenizer
from pdjax.policies import Colocated, Disaggregated
from pdjax.types import ModelSpec, Request, SamplingParams, colocated_pool, decode_pool, parse_split, prefill_pool
from pdjax.workload import Given

TINY = ModelSpec(
  name='tiny', num_layers=2, embed_dim=24, query_heads=6, kv_heads=2, head_dim=8, ffn_dim=48, vocab_size=96,
  context_len=64, eos_token_ids=(1,),
)  # fmt: skip
TINY_12_12 = dataclasses.replace(TINY, name='tiny-12/12', query_heads=12, kv_heads=12)
TINY_8_2 = dataclasses.replace(TINY, name='tiny-8/2', query_heads=8, kv_heads=2)

SIZES = {'max_sequences': 4, 'max_step_tokens': 32, 'max_chunks': 4, 'num_pages': 64}


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
  """Token ids of the tiny vocabulary, without its end-of-sequence token."""
  return tuple(2 + (seed * 31 + i * 7 + i * i) % (TINY.vocab_size - 2) for i in range(length))


def requests(lengths=(1, 3, 4, 9, 17, 40), max_tokens: int = 6, **sampling) -> tuple[Request, ...]:
  """One request a length, all at once: shorter than a page, of exactly a page, of one token, of several chunks."""
  return tuple(
    Request(f'r{i}', prompt(length, seed=i), SamplingParams(max_tokens=max_tokens, seed=i, **sampling))
    for i, length in enumerate(lengths)
  )


def config(
  split: str = '1P1D',
  prefill_tp: int = 1,
  decode_tp: int = 1,
  model: ModelSpec = TINY,
  page_size: int = 4,
  workload=None,
  **sizes,
) -> ServingConfig:
  """A tiny run with random weights; `split='2C'` is two colocated workers of `decode_tp` devices."""
  sizes = {**SIZES, **sizes}
  if split.endswith('C'):
    workers, policy = colocated_pool(int(split[:-1]), tp=decode_tp, **sizes), Colocated(token_budget=16)
  else:
    num_prefill, num_decode = parse_split(split)
    workers = prefill_pool(num_prefill, tp=prefill_tp, **sizes) + decode_pool(num_decode, tp=decode_tp, **sizes)
    policy = Disaggregated(max_prefill_tokens=16)
  return ServingConfig(
    model=model,
    checkpoint='random',
    workers=workers,
    policy=policy,
    workload=workload if workload is not None else Given(requests()),
    page_size=page_size,
    platform='cpu',
  )


@functools.cache
def byte_tokenizer() -> Tokenizer:
  """One token a byte, for tests about text: ids 0 to 2 are special, 3 to 97 are ASCII from the space on."""
  signs = [*range(32, 127)]
  printable = {*range(33, 127), *range(161, 173), *range(174, 256)}  # these stand for themselves in a byte-level BPE
  others = (chr(256 + index) for index in range(256))
  letters = {byte: chr(byte) if byte in printable else next(others) for byte in range(256)}
  order = [*signs, *sorted(letters.keys() - signs)]
  vocabulary = {'<s>': 0, '</s>': 1, '<turn>': 2} | {letters[byte]: 3 + i for i, byte in enumerate(order)}
  backend = tokenizers.Tokenizer(models.BPE(vocabulary, []))
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  backend.decoder = decoders.ByteLevel()
  backend.add_special_tokens(['<s>', '</s>', '<turn>'])
  return Tokenizer(backend, eos_token_ids=(1,))
