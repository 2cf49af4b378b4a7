"""Checkpoints as Hugging Face writes them, out of weights in our names and shapes."""

import json
import pathlib
from collections.abc import Mapping

import numpy as np
import safetensors.numpy

from pdjax.model.checkpoint import Checkpoint, tensor_shapes

KINDS = {
  'attn_norm': 'input_layernorm', 'mlp_norm': 'post_attention_layernorm',
  'q': 'self_attn.q_proj', 'k': 'self_attn.k_proj', 'v': 'self_attn.v_proj', 'o': 'self_attn.o_proj',
  'q_norm': 'self_attn.q_norm', 'k_norm': 'self_attn.k_norm',
  'gate': 'mlp.gate_proj', 'up': 'mlp.up_proj', 'down': 'mlp.down_proj',
  'embed': 'model.embed_tokens', 'final_norm': 'model.norm', 'unembed': 'lm_head',
}  # fmt: skip


def hf_tensors(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Weights under Hugging Face's names, as [outputs, inputs]."""
  tensors = {}
  for name, weight in weights.items():
    head, kind = name.rpartition('.')[::2]
    part = 'bias' if kind.endswith('_bias') else 'weight'
    kind = kind.removesuffix('_bias')
    if part == 'bias':
      weight = weight.reshape(-1)
    elif kind in ('q', 'k', 'v'):
      weight = np.concatenate([weight[:, i].T for i in range(weight.shape[1])])
    elif kind == 'o':
      weight = np.concatenate(list(weight)).T
    elif kind != 'embed' and weight.ndim == 2:
      weight = weight.T
    prefix = f'model.{head}.' if head else ''
    tensors[f'{prefix}{KINDS[kind]}.{part}'] = np.ascontiguousarray(weight)
  return tensors


def write_folder(folder: pathlib.Path, checkpoint: Checkpoint) -> None:
  """Write a checkpoint without a tokenizer into a folder."""
  spec = checkpoint.spec
  tensors = hf_tensors({name: checkpoint.tensor(name) for name in tensor_shapes(spec)})
  safetensors.numpy.save_file(tensors, folder / 'model.safetensors')
  config = {
    'model_type': 'llama', 'hidden_size': spec.embed_dim, 'num_hidden_layers': spec.num_layers,
    'num_attention_heads': spec.query_heads, 'num_key_value_heads': spec.kv_heads, 'head_dim': spec.head_dim,
    'intermediate_size': spec.ffn_dim, 'vocab_size': spec.vocab_size, 'max_position_embeddings': spec.context_len,
    'rms_norm_eps': spec.norm_eps, 'rope_theta': spec.rope_theta, 'eos_token_id': list(spec.eos_token_ids),
    'tie_word_embeddings': spec.tied_embeddings,
  }  # fmt: skip
  (folder / 'config.json').write_text(json.dumps(config))
