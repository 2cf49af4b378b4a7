r"""Writes tests/data/families: a tiny random checkpoint for each model family, and the logits of transformers for it.

python tests/data/make_families.py        # needs torch and transformers, which the tests do not

Each config.json is written here by hand, in the older or the newer form, and read by transformers and by pdjax alike.
"""

import json
import math
import pathlib

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

FOLDER = pathlib.Path(__file__).parent / 'families'

SHAPE = {
  'hidden_size': 24, 'num_hidden_layers': 2, 'num_attention_heads': 4, 'num_key_value_heads': 2,
  'intermediate_size': 32, 'vocab_size': 64, 'max_position_embeddings': 128, 'rms_norm_eps': 1e-5,
  'hidden_act': 'silu', 'eos_token_id': 2,
}  # fmt: skip

# None leaves a key out.
CONFIGS = {
  'llama2': {
    'architectures': ['LlamaForCausalLM'], 'model_type': 'llama', 'num_key_value_heads': None,
    'rope_scaling': None, 'torch_dtype': 'float16', 'tie_word_embeddings': False, 'pretraining_tp': 1,
  },
  'llama2-linear': {
    'architectures': ['LlamaForCausalLM'], 'model_type': 'llama', 'rope_theta': 5000.0,
    'rope_scaling': {'type': 'linear', 'factor': 4.0}, 'torch_dtype': 'float16', 'tie_word_embeddings': False,
  },
  'llama3': {  # wavelengths of 6 tokens (kept), 20 and 63 (blended), 199 and more (slowed)
    'architectures': ['LlamaForCausalLM'], 'model_type': 'llama', 'head_dim': 16, 'dtype': 'float16',
    'rope_parameters': {
      'rope_type': 'llama3', 'rope_theta': 10_000.0, 'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
      'original_max_position_embeddings': 64,
    },
    'tie_word_embeddings': False, 'attention_bias': False, 'mlp_bias': False, 'eos_token_id': [2, 5],
  },
  'smollm2': {
    'architectures': ['LlamaForCausalLM'], 'model_type': 'llama', 'num_attention_heads': 3, 'num_key_value_heads': 1,
    'rope_theta': 100_000, 'rope_scaling': None, 'torch_dtype': 'float16', 'tie_word_embeddings': True,
    'rope_interleaved': False, 'is_llama_config': True,
  },
  'mistral': {
    'architectures': ['MistralForCausalLM'], 'model_type': 'mistral', 'sliding_window': 8, 'rope_theta': 10_000.0,
    'torch_dtype': 'float16', 'tie_word_embeddings': False,
  },
  'qwen2': {  # the first layer sees everything, the others a window
    'architectures': ['Qwen2ForCausalLM'], 'model_type': 'qwen2', 'num_hidden_layers': 3, 'rope_theta': 1_000_000.0,
    'use_sliding_window': True, 'sliding_window': 8, 'max_window_layers': 1, 'rms_norm_eps': 1e-6,
    'torch_dtype': 'float16', 'tie_word_embeddings': False,
  },
  'qwen3': {
    'architectures': ['Qwen3ForCausalLM'], 'model_type': 'qwen3', 'num_hidden_layers': 3, 'head_dim': 16,
    'rope_parameters': {'rope_type': 'default', 'rope_theta': 1_000_000.0}, 'dtype': 'float16',
    'use_sliding_window': True, 'sliding_window': 8, 'max_window_layers': 1, 'rms_norm_eps': 1e-6,
    'layer_types': ['sliding_attention', 'full_attention', 'sliding_attention'], 'attention_bias': False,
    'tie_word_embeddings': True,
  },
}  # fmt: skip

PROMPT_LEN = {'llama3': 96}
DEFAULT_PROMPT_LEN = 40


def shake(model: torch.nn.Module, generator: torch.Generator) -> None:
  """Random weights that keep activations near unit size, make every norm and bias count, and are float16 numbers."""
  for name, weight in model.named_parameters():
    values = torch.randn(weight.shape, generator=generator)
    if 'norm' in name:
      values = 1 + 0.3 * values
    elif name.endswith('bias'):
      values = 0.5 * values
    elif 'embed_tokens' not in name:
      values = values * 1.5 / math.sqrt(weight.shape[1])
    with torch.no_grad():
      weight.copy_(values.half().float())


def write(name: str, changes: dict) -> None:
  """Write the checkpoint of one family and its logits."""
  folder = FOLDER / name
  folder.mkdir(parents=True, exist_ok=True)
  config = {key: value for key, value in (SHAPE | changes).items() if value is not None}
  (folder / 'config.json').write_text(json.dumps(config, indent=2) + '\n')
  parsed = AutoConfig.from_pretrained(folder)
  model = AutoModelForCausalLM.from_config(parsed, dtype=torch.float32, attn_implementation='eager').eval()
  generator = torch.Generator().manual_seed(sum(name.encode()))
  shake(model, generator)
  tensors = {key: value.half().contiguous() for key, value in model.state_dict().items()}
  if parsed.tie_word_embeddings:
    tensors.pop('lm_head.weight', None)
  save_file(tensors, folder / 'model.safetensors', metadata={'format': 'pt'})
  length = PROMPT_LEN.get(name, DEFAULT_PROMPT_LEN)
  prompt = torch.randint(3, parsed.vocab_size, (1, length), generator=generator)
  with torch.no_grad():
    logits = model(prompt).logits[0]
  np.savez_compressed(folder / 'logits.npz', prompt=prompt[0].numpy().astype(np.int32), logits=logits.numpy())
  print(f'{name}: {sum(file.stat().st_size for file in folder.iterdir()):,} bytes, logits to {logits.abs().max():.1f}')


if __name__ == '__main__':
  for name, changes in CONFIGS.items():
    write(name, changes)
