"""The names of weights in each file format, beside those of the weights table."""

from typing import Literal

Format = Literal['safetensors', 'gguf']

_NAMES: dict[Format, dict[str, str]] = {
  'safetensors': {
    'embed': 'model.embed_tokens.weight',
    'final_norm': 'model.norm.weight',
    'unembed': 'lm_head.weight',
    'attn_norm': 'input_layernorm.weight',
    'q': 'self_attn.q_proj.weight',
    'k': 'self_attn.k_proj.weight',
    'v': 'self_attn.v_proj.weight',
    'q_bias': 'self_attn.q_proj.bias',
    'k_bias': 'self_attn.k_proj.bias',
    'v_bias': 'self_attn.v_proj.bias',
    'q_norm': 'self_attn.q_norm.weight',
    'k_norm': 'self_attn.k_norm.weight',
    'o': 'self_attn.o_proj.weight',
    'mlp_norm': 'post_attention_layernorm.weight',
    'gate': 'mlp.gate_proj.weight',
    'up': 'mlp.up_proj.weight',
    'down': 'mlp.down_proj.weight',
  },
  'gguf': {
    'embed': 'token_embd.weight',
    'final_norm': 'output_norm.weight',
    'unembed': 'output.weight',
    'attn_norm': 'attn_norm.weight',
    'q': 'attn_q.weight',
    'k': 'attn_k.weight',
    'v': 'attn_v.weight',
    'q_bias': 'attn_q.bias',
    'k_bias': 'attn_k.bias',
    'v_bias': 'attn_v.bias',
    'q_norm': 'attn_q_norm.weight',
    'k_norm': 'attn_k_norm.weight',
    'o': 'attn_output.weight',
    'mlp_norm': 'ffn_norm.weight',
    'gate': 'ffn_gate.weight',
    'up': 'ffn_up.weight',
    'down': 'ffn_down.weight',
  },
}
_LAYER: dict[Format, str] = {'safetensors': 'model.layers.{}.', 'gguf': 'blk.{}.'}


def name_in(format: Format, name: str) -> str:
  """The name in a file of the weight that the table calls `name`, such as `embed` or `layers.3.q`."""
  names = _NAMES[format]
  if name in names:
    return names[name]
  _, layer, kind = name.split('.')
  return _LAYER[format].format(layer) + names[kind]
