"""Hugging Face's transformers on torch as a peer to measure against: our checkpoint's weights in a process of its own.

In a process of its own because torch's OpenMP threads go on spinning for a while after each operation: beside XLA's
they would cost both of them time.
"""

import importlib.util
import itertools
import multiprocessing
import statistics
import time
import traceback
from collections.abc import Sequence
from typing import Any, NamedTuple

from pdjax.model.checkpoint import Checkpoint, open_checkpoint
from pdjax.model.checkpoint.names import name_in
from pdjax.types import ModelSpec


def missing() -> list[str]:
  """The packages that the peer needs and that are not installed."""
  return [name for name in ('torch', 'transformers') if importlib.util.find_spec(name) is None]


def plain_llama(model: ModelSpec) -> bool:
  """Whether `LlamaForCausalLM` with the settings that the peer gives it computes this model."""
  return not (model.rope_scaling or model.sliding_window or model.qkv_bias or model.qk_norm)


class Generated(NamedTuple):
  """The outcome of a batch of prompts: seconds to the first tokens, mean seconds a step after them, every token."""

  prefill_s: float
  step_s: float
  tokens: list[list[int]]


class TransformersPeer:
  """A process that holds the model and answers one question at a time."""

  def __init__(self, checkpoint: str, threads: int, attention: str):
    """Load a checkpoint's weights into `LlamaForCausalLM`.

    Args:
      checkpoint: As `open_checkpoint` takes it.
      threads: Of torch.
      attention: transformers' name of the way attention is computed, 'sdpa' or 'eager'.
    """
    context = multiprocessing.get_context('spawn')
    self._pipe, theirs = context.Pipe()
    self._process = context.Process(target=_serve, args=(theirs, checkpoint, threads, attention), daemon=True)
    self._process.start()
    theirs.close()
    self.version: str = self._answer()

  def generate(self, prompts: Sequence[Sequence[int]], steps: int) -> Generated:
    """Prefill prompts of one length as one batch, then decode greedily; transformers' own cache, no gradients.

    The time of the first step after the prompts does not count: it is where memory is first allocated. The cache after
    the prompts is kept for the next call with as many prompts of that length, of which the prefill is not repeated.
    """
    self._pipe.send((prompts, steps))
    return self._answer()

  def close(self) -> None:
    """End the process."""
    self._pipe.send(None)
    self._process.join()

  def _answer(self) -> Any:
    try:
      answer = self._pipe.recv()
    except EOFError:
      self._process.join()
      raise RuntimeError(
        f'the process of transformers ended with exit code {self._process.exitcode}; '
        'a negative one is a signal, and -9 often means too little memory.'
      ) from None
    if isinstance(answer, str) and answer.startswith('Traceback'):
      raise RuntimeError(f'transformers failed: {answer}')
    return answer


def _serve(pipe, checkpoint: str, threads: int, attention: str) -> None:
  """In the process: load, then answer until there are no more questions."""
  try:
    import torch
    import transformers

    torch.set_num_threads(threads)
    model = _load(open_checkpoint(checkpoint), attention)
    pipe.send(f'transformers {transformers.__version__}, torch {torch.__version__}, {attention} attention')
    while (question := pipe.recv()) is not None:
      pipe.send(_generate(model, *question))
  except Exception:
    pipe.send(traceback.format_exc())


def _load(checkpoint: Checkpoint, attention: str):
  import torch
  from transformers import LlamaConfig, LlamaForCausalLM

  spec = checkpoint.spec
  with torch.device('meta'):
    model = LlamaForCausalLM(LlamaConfig(**_config(spec) | {'attn_implementation': attention}))
  model = model.to_empty(device='cpu')
  tensors = {}
  for name, shape in ((name, row.stored_shape) for name, row in spec.weights.items()):
    tensor = checkpoint.tensor(name)
    if tensor.ndim > 1 and name != 'embed':  # ours keep inputs first
      outputs, inputs = shape
      tensor = tensor.reshape(inputs, outputs).T
    tensors[name_in('safetensors', name)] = torch.tensor(tensor, dtype=torch.float32)
  if spec.tied_embeddings:
    tensors['lm_head.weight'] = tensors['model.embed_tokens.weight']
  model.load_state_dict(tensors, assign=True)
  model.tie_weights()
  model.model.rotary_emb = type(model.model.rotary_emb)(model.config)  # its table is not among the weights
  return model.eval()


def _config(spec: ModelSpec) -> dict[str, Any]:
  return {
    'vocab_size': spec.vocab_size, 'hidden_size': spec.embed_dim, 'intermediate_size': spec.ffn_dim,
    'num_hidden_layers': spec.num_layers, 'num_attention_heads': spec.query_heads,
    'num_key_value_heads': spec.kv_heads, 'head_dim': spec.head_dim, 'rms_norm_eps': spec.norm_eps,
    'max_position_embeddings': spec.context_len, 'tie_word_embeddings': spec.tied_embeddings,
    'rope_parameters': {'rope_type': 'default', 'rope_theta': spec.rope_theta},
  }  # fmt: skip


_kept: dict[tuple, Any] = {}
"""Caches after prompts, by the prompts."""


def _generate(model, prompts, steps: int) -> Generated:
  import torch
  from transformers import DynamicCache

  ids = torch.tensor(prompts)
  key = tuple(map(tuple, prompts))
  with torch.inference_mode():
    begin = time.perf_counter()
    if key not in _kept or not steps:
      cache = DynamicCache(config=model.config)
      out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
      token = out.logits[:, -1].argmax(-1, keepdim=True)
      _kept[key] = cache, token
    cache, token = _kept[key]
    prefill_s = time.perf_counter() - begin
    if grown := cache.get_seq_length() - ids.shape[1]:
      cache.crop(-grown)
    tokens, ends = [token], []
    for _ in range(steps):
      out = model(tokens[-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
      tokens.append(out.logits[:, -1].argmax(-1, keepdim=True))
      ends.append(time.perf_counter())
  step_s = statistics.fmean(b - a for a, b in itertools.pairwise(ends)) if steps > 1 else 0.0
  return Generated(prefill_s, step_s, torch.cat(tokens, dim=1).tolist())
