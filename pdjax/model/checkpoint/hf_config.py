"""Reads a config.json as Hugging Face writes it, and refuses every model that pdjax would compute wrongly."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from pdjax.model.checkpoint.base import checked_spec
from pdjax.types.model import MAX_LAYERS, ModelSpec, RopeScaling, is_positive, is_size


@dataclasses.dataclass(frozen=True)
class _Family:
  """The features of a `model_type`, and its defaults for settings that its config.json leaves out."""

  context_len: int
  kv_heads: int | None = None  # None: one for each query head
  head_dim: int | None = None  # None: the width of the model shared among the query heads
  qkv_bias: bool = False
  qk_norm: bool = False
  eos_token_id: int | None = None


_FAMILIES = {
  'llama': _Family(context_len=2048, eos_token_id=2),
  'mistral': _Family(context_len=131_072, kv_heads=8, eos_token_id=2),
  'qwen2': _Family(context_len=32_768, kv_heads=32, qkv_bias=True),
  'qwen3': _Family(context_len=32_768, kv_heads=32, head_dim=128, qk_norm=True),
}
_SLIDING_WINDOW = 4096  # where a family that has windows does not say

# Settings that must be left out, null or one of these values.
_ALLOWED: dict[str, tuple[Any, ...]] = {
  'attention_bias': (False,),
  'mlp_bias': (False,),
  'hidden_act': ('silu', 'swish'),
  'partial_rotary_factor': (1, 1.0),
  'quantization_config': (),
  'compression_config': (),
}


def declared_dtype(config: Mapping[str, Any]) -> Any:
  """The floating-point type that the configuration names, in its newer or its older key."""
  return config.get('dtype') or config.get('torch_dtype')


def default_eos_ids(config: Mapping[str, Any]) -> list[int]:
  """The end tokens of a family where its configuration leaves `eos_token_id` out; a null says that there are none."""
  family = _FAMILIES.get(str(config.get('model_type')))
  vocab_size = config.get('vocab_size')
  if family is None or family.eos_token_id is None or not is_size(vocab_size) or family.eos_token_id >= vocab_size:
    return []
  return [family.eos_token_id]


def spec_from_config(
  settings: Mapping[str, Any], path: pathlib.Path, name: str, eos_token_ids: Sequence[int]
) -> ModelSpec:
  """The shape of the model that a config.json describes.

  It is read as transformers reads it: settings that are left out take the defaults of their family, and the rotary
  embedding is described by `rope_scaling` and `rope_theta` or, in newer files, by `rope_parameters`.

  Args:
    settings: The contents of the file.
    path: The file, for error messages.
    name: The name of the model.
    eos_token_ids: Tokens that end a sequence.

  Raises:
    ValueError: if a setting is missing or of another kind, or pdjax would compute the model wrongly.
  """
  config = _Config(path, settings)
  family = config.family()
  config.refuse_unsupported()
  embed_dim, query_heads = config.size('hidden_size'), config.size('num_attention_heads')
  num_layers = config.size('num_hidden_layers', most=MAX_LAYERS)  # they are listed before the model is made
  context_len = config.size('max_position_embeddings', family.context_len)
  # As in transformers, a null asks for one key/value head for each query head in every family.
  kv_heads = query_heads if 'num_key_value_heads' in config.settings else family.kv_heads or query_heads
  rope_theta, rope_scaling = config.rope(context_len)
  sliding_window, windowed_layers = config.windows(num_layers)
  return checked_spec(
    path,
    name=name,
    num_layers=num_layers,
    embed_dim=embed_dim,
    query_heads=query_heads,
    kv_heads=config.size('num_key_value_heads', kv_heads),
    head_dim=config.size('head_dim', family.head_dim or embed_dim // query_heads),
    ffn_dim=config.size('intermediate_size'),
    vocab_size=config.size('vocab_size'),
    context_len=context_len,
    rope_theta=rope_theta,
    norm_eps=config.number('rms_norm_eps', 1e-6),
    tied_embeddings=config.flag('tie_word_embeddings'),
    eos_token_ids=tuple(eos_token_ids),
    rope_scaling=rope_scaling,
    sliding_window=sliding_window,
    windowed_layers=windowed_layers,
    qkv_bias=family.qkv_bias,
    qk_norm=family.qk_norm,
  )


@dataclasses.dataclass(frozen=True)
class _Config:
  """A config.json with the checks that its settings need."""

  path: pathlib.Path
  settings: Mapping[str, Any]

  def get(self, key: str, default: Any = None) -> Any:
    """A setting; null is as good as left out."""
    value = self.settings.get(key)
    return default if value is None else value

  def size(self, key: str, default: int | None = None, least: int = 1, most: int | None = None) -> int:
    value = self.get(key, default)
    if type(value) is not int or value < least or (most is not None and value > most):
      expected = 'a positive integer' if least == 1 else f'an integer of at least {least}'
      expected += '' if most is None else f', at most {most:,}'
      raise ValueError(f'{self.path} has {key}={value!r}, expected {expected}; download it again or correct it.')
    return value

  def flag(self, key: str) -> bool:
    value = self.get(key, False)
    if not isinstance(value, bool):
      raise ValueError(f'{self.path} has {key}={value!r}, expected true or false; download it again or correct it.')
    return value

  def number(self, key: str, default: float | None = None, within: Mapping[str, Any] | None = None) -> float:
    value = self.get(key) if within is None else within.get(key)
    value = default if value is None else value
    if not is_positive(value):
      place = '' if within is None else f' in its rotary settings {dict(within)!r}'
      raise ValueError(
        f'{self.path} has {key}={value!r}{place}, expected a positive number; download it again or correct it.'
      )
    return float(value)

  @property
  def model_type(self) -> str:
    return str(self.settings.get('model_type'))

  def family(self) -> _Family:
    if self.model_type not in _FAMILIES:
      raise ValueError(
        f'{self.path} has model_type {self.settings.get("model_type")!r}, expected one of {", ".join(_FAMILIES)}; '
        'pdjax computes no other architecture yet, so use a model of one of these.'
      )
    architectures = self.get('architectures', [])
    expected = f'{self.model_type}forcausallm'
    listed = isinstance(architectures, list)
    if not listed or (architectures and expected not in [str(one).lower() for one in architectures]):
      raise ValueError(
        f'{self.path} has architectures {architectures!r}, expected {self.model_type.capitalize()}ForCausalLM in a '
        'list; pdjax generates text and has no other heads, so use a model for that.'
      )
    return _FAMILIES[self.model_type]

  def refuse_unsupported(self) -> None:
    rope = self._rope_settings()
    for key, values in _ALLOWED.items():
      if key == 'attention_bias' and self.model_type == 'qwen2':
        continue  # its queries, keys and values have biases in any case
      value = self.get(key, rope.get(key))
      if value is not None and value not in values:
        expected = ' or '.join(repr(v) for v in values) or 'none'
        raise ValueError(
          f'{self.path} has {key}={value!r}, expected {expected}; pdjax does not compute such a model yet.'
        )

  def _rope_settings(self) -> dict[str, Any]:
    rope = self.get('rope_scaling') or self.get('rope_parameters') or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
      raise ValueError(
        f'{self.path} has the rotary settings {rope!r}, expected one set of them for all layers; '
        'pdjax does not compute such a model yet.'
      )
    return rope

  def rope(self, context_len: int) -> tuple[float, RopeScaling | None]:
    """The base of the rotary embedding and how it is stretched."""
    rope = self._rope_settings()
    theta = self.number('rope_theta', self.number('rope_theta', 10_000.0), within=rope)
    kind = rope.get('rope_type') or rope.get('type') or 'default'
    if kind == 'default':
      return theta, None
    if kind not in ('linear', 'llama3'):
      raise ValueError(
        f"{self.path} scales its rotary embedding by {kind!r}, expected 'default', 'linear' or 'llama3'; pdjax does "
        'not compute other scalings yet, so use a model without.'
      )
    factor = self.number('factor', within=rope)
    if kind == 'linear':
      return theta, RopeScaling('linear', factor)
    original = self.get('original_max_position_embeddings', rope.get('original_max_position_embeddings'))
    original = context_len if original is None else original
    if not is_size(original):
      raise ValueError(
        f'{self.path} has original_max_position_embeddings={original!r}, expected a positive integer; correct it.'
      )
    low, high = (self.number(f'{end}_freq_factor', within=rope) for end in ('low', 'high'))
    try:
      return theta, RopeScaling('llama3', factor, low, high, original)
    except ValueError as error:
      raise ValueError(f'{self.path}: {error}') from error

  def windows(self, num_layers: int) -> tuple[int | None, tuple[int, ...] | None]:
    """The sliding window, and the layers that have it if not all do."""
    has_window = self.model_type == 'mistral' or (
      self.model_type.startswith('qwen') and self.flag('use_sliding_window')
    )
    # Here a null says that there is none.
    window = self.settings.get('sliding_window', _SLIDING_WINDOW) if has_window else None
    if window is not None:
      window = self.size('sliding_window', _SLIDING_WINDOW)
    chosen = window is not None and self.model_type != 'mistral'  # else all layers are alike
    first = self.size('max_window_layers', 28, least=0) if chosen else 0
    windowed = [window is not None and layer >= first for layer in range(num_layers)]
    kinds = self.get('layer_types', ['sliding_attention' if one else 'full_attention' for one in windowed])
    choosable = ['full_attention'] if window is None else ['sliding_attention']
    if chosen:
      choosable.insert(0, 'full_attention')
    if not isinstance(kinds, list) or len(kinds) != num_layers or not all(kind in choosable for kind in kinds):
      raise ValueError(
        f'{self.path} has layer_types={kinds!r}, expected {num_layers} times {" or ".join(choosable)} '
        f'with model_type {self.model_type!r} and sliding_window={window}; pdjax does not compute such a model yet.'
      )
    layers = tuple(layer for layer, kind in enumerate(kinds) if kind == 'sliding_attention')
    if not layers:
      return None, None
    return window, None if len(layers) == num_layers else layers
