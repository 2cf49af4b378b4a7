"""The shape of a language model, and what follows from it: parameters, bytes, FLOPs."""

import dataclasses
import sys
from typing import Any, Literal, TypeGuard

MAX_LAYERS = 10_000  # no model has a tenth of them: more is a damaged file, and to list them all would take minutes

KV_DTYPE_BYTES = {'float32': 4, 'bfloat16': 2, 'float16': 2, 'int8': 1}  # of a cached element


def is_size(value: Any) -> TypeGuard[int]:
  """Whether this is a positive integer."""
  return type(value) is int and value > 0


def is_positive(value: Any) -> TypeGuard[float]:
  """Whether this is a positive number that is finite as a float."""
  return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


@dataclasses.dataclass(frozen=True, slots=True)
class RopeScaling:
  """The stretching of a rotary embedding to longer contexts than it was trained for.

  Attributes:
    kind: 'linear' divides every frequency by `factor` (Chen et al. 2023); 'llama3' divides those that turn less than
      `low_freq_factor` times within `original_context_len`, keeps those that turn more than `high_freq_factor` times,
      and blends between (Grattafiori et al. 2024).
    factor: The factor of that.
    low_freq_factor: Turns; for 'llama3'.
    high_freq_factor: Turns; for 'llama3'.
    original_context_len: Tokens; for 'llama3'.

  Raises:
    ValueError: if a number is not positive and finite, or the two frequency factors are not ascending.
  """

  kind: Literal['linear', 'llama3']
  factor: float
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_context_len: int = 8192

  def __post_init__(self):
    if self.kind not in ('linear', 'llama3'):
      raise ValueError(f"rope scaling is of kind {self.kind!r}, expected 'linear' or 'llama3'.")
    for field in ('factor', 'low_freq_factor', 'high_freq_factor', 'original_context_len'):
      if not is_positive(getattr(self, field)):
        raise ValueError(f'rope scaling has {field}={getattr(self, field)!r}, expected a positive number.')
    if not is_size(self.original_context_len):
      raise ValueError(f'rope scaling has original_context_len={self.original_context_len!r}, expected an integer.')
    if self.low_freq_factor >= self.high_freq_factor:
      raise ValueError(
        f'rope scaling has low_freq_factor={self.low_freq_factor} and high_freq_factor={self.high_freq_factor}; '
        'the first must be the smaller.'
      )


@dataclasses.dataclass(frozen=True, slots=True)
class ModelSpec:
  """A decoder-only transformer of the Llama family: Llama, SmolLM2, Mistral, Qwen2 and Qwen3 differ in fields alone.

  Attributes:
    name: For reports.
    num_layers: Transformer blocks, L; at most `MAX_LAYERS`.
    embed_dim: Width of the residual stream, E.
    query_heads: Query heads, H.
    kv_heads: Key/value heads, K; divides H (grouped-query attention, Ainslie et al. 2023).
    head_dim: Size of one head, D; even, because the rotary embedding turns pairs.
    ffn_dim: Width of the gated feed-forward layer, F.
    vocab_size: Tokens, V.
    context_len: Longest sequence, in tokens.
    rope_theta: Base of the rotary position embedding (Su et al. 2021).
    norm_eps: Epsilon of the RMS norms.
    tied_embeddings: The output projection is the transposed input embedding.
    eos_token_ids: Tokens that end a sequence; below V.
    rope_scaling: The stretching of the rotary embedding, if any.
    sliding_window: Tokens that a token sees, itself among them (Mistral, Jiang et al. 2023); None is all before it.
    windowed_layers: The layers with that window; None is every layer.
    qkv_bias: Queries, keys and values have a bias (Qwen2).
    qk_norm: Each head of the queries and keys passes an RMS norm before it is turned (Qwen3).

  Raises:
    ValueError: if a field is of another kind or out of range, or the key/value heads do not divide the query heads.
  """

  name: str
  num_layers: int
  embed_dim: int
  query_heads: int
  kv_heads: int
  head_dim: int
  ffn_dim: int
  vocab_size: int
  context_len: int
  rope_theta: float = 10_000.0
  norm_eps: float = 1e-5
  tied_embeddings: bool = False
  eos_token_ids: tuple[int, ...] = ()
  rope_scaling: RopeScaling | None = None
  sliding_window: int | None = None
  windowed_layers: tuple[int, ...] | None = None
  qkv_bias: bool = False
  qk_norm: bool = False

  def __post_init__(self):
    sizes = ('num_layers', 'embed_dim', 'query_heads', 'kv_heads', 'head_dim', 'ffn_dim', 'vocab_size', 'context_len')
    for size in sizes:
      self._expect(size, is_size(getattr(self, size)), 'an integer of at least 1')
    self._expect('num_layers', self.num_layers <= MAX_LAYERS, f'at most {MAX_LAYERS:,}')
    self._expect('head_dim', self.head_dim % 2 == 0, 'an even number, because its features turn in pairs')
    for number in ('rope_theta', 'norm_eps'):
      self._expect(number, is_positive(getattr(self, number)), 'a positive number')
    for flag in ('tied_embeddings', 'qkv_bias', 'qk_norm'):
      self._expect(flag, isinstance(getattr(self, flag), bool), 'True or False')
    self._expect('name', isinstance(self.name, str), 'a text')
    self._expect(
      'rope_scaling', self.rope_scaling is None or isinstance(self.rope_scaling, RopeScaling), 'a RopeScaling or None'
    )
    self._expect(
      'eos_token_ids',
      _are_below(self.vocab_size, self.eos_token_ids),
      f'a tuple of integers from 0 to {self.vocab_size - 1}, as its vocabulary has',
    )
    if self.query_heads % self.kv_heads:
      raise ValueError(
        f'model {self.name!r} has {self.query_heads} query heads and {self.kv_heads} key/value heads; '
        'the second must divide the first.'
      )
    self._expect(
      'sliding_window', self.sliding_window is None or is_size(self.sliding_window), 'at least 1 token, or None'
    )
    self._expect(
      'windowed_layers',
      self.windowed_layers is None or _are_below(self.num_layers, self.windowed_layers),
      f'None or a tuple of its layers, 0 to {self.num_layers - 1}',
    )

  def _expect(self, field: str, holds: bool, expected: str) -> None:
    if not holds:
      raise ValueError(f'model {self.name!r} has {field}={getattr(self, field)!r}, expected {expected}.')

  def window(self, layer: int) -> int | None:
    """Tokens that a token sees in this layer, itself among them; None is all before it."""
    return self.sliding_window if self.windowed_layers is None or layer in self.windowed_layers else None

  @property
  def layer_params(self) -> int:
    """Parameters of one block, its norms and biases included."""
    attention = self.embed_dim * self.head_dim * 2 * (self.query_heads + self.kv_heads)
    biases = self.head_dim * (self.query_heads + 2 * self.kv_heads) if self.qkv_bias else 0
    return attention + biases + 3 * self.embed_dim * self.ffn_dim + self._norm_params

  @property
  def _norm_params(self) -> int:
    return 2 * self.embed_dim + (2 * self.head_dim if self.qk_norm else 0)

  @property
  def num_params(self) -> int:
    """Parameters of the whole model."""
    embeddings = self.vocab_size * self.embed_dim * (1 if self.tied_embeddings else 2)
    return self.num_layers * self.layer_params + embeddings + self.embed_dim

  def weight_bytes(self, dtype_bytes: int) -> int:
    """Bytes of all weights at this many bytes each."""
    return self.num_params * dtype_bytes

  def weight_bytes_per_device(self, dtype_bytes: int, tp: int) -> int:
    """Bytes of the weights on each of `tp` devices: what `tp` does not divide lies whole on all of them.

    Raises:
      ValueError: if `tp` does not fit the heads.
    """
    kv_shards, _ = mesh_shape(self, tp)
    query_heads, kv_heads = self.query_heads // tp, self.kv_heads // kv_shards
    attention = 2 * self.embed_dim * self.head_dim * (query_heads + kv_heads)
    if self.qkv_bias:
      attention += self.head_dim * (query_heads + 2 * kv_heads)
    ffn = 3 * self.embed_dim * self.ffn_dim // (tp if self.ffn_dim % tp == 0 else 1)
    vocab = self.embed_dim * self.vocab_size // (tp if self.vocab_size % tp == 0 else 1)
    layers = self.num_layers * (attention + ffn + self._norm_params)
    return (layers + vocab * (1 if self.tied_embeddings else 2) + self.embed_dim) * dtype_bytes

  def kv_bytes_per_token(self, dtype_bytes: int) -> int:
    """Bytes of keys and values that one token leaves in the cache, over all layers."""
    return 2 * self.num_layers * self.kv_heads * self.head_dim * dtype_bytes

  def cached_token_bytes(self, kv_dtype: str) -> int:
    """Bytes that one token leaves in a cache of a dtype of `KV_DTYPE_BYTES`: of int8, the float32 scales too."""
    scales = 2 * self.num_layers * self.kv_heads * 4 if kv_dtype == 'int8' else 0
    return self.kv_bytes_per_token(KV_DTYPE_BYTES[kv_dtype]) + scales

  def token_flops(self) -> int:
    """FLOPs of one token's passage through the blocks, attention over the cache left out."""
    return 2 * self.num_layers * self.layer_params

  def attention_flops(self, new_tokens: int, cached_tokens: int) -> int:
    """FLOPs of causal attention for `new_tokens` tokens that follow `cached_tokens` in one sequence."""
    pairs = new_tokens * cached_tokens + new_tokens * (new_tokens + 1) // 2
    windowed = self._num_windowed_layers
    total = (self.num_layers - windowed) * pairs
    if windowed and self.sliding_window is not None:
      # Tokens at position `sliding_window` and up miss what lies before their window.
      first = max(cached_tokens + 1 - self.sliding_window, 1)
      last = cached_tokens + new_tokens - self.sliding_window
      hidden = max(last - first + 1, 0) * (first + last) // 2
      total += windowed * (pairs - hidden)
    return 4 * self.query_heads * self.head_dim * total

  def attended_tokens(self, context: int) -> float:
    """Cached tokens that one token reads, the mean over the layers: fewer than `context` past a sliding window."""
    if self.sliding_window is None or context <= self.sliding_window:
      return context
    share = self._num_windowed_layers / self.num_layers
    return share * self.sliding_window + (1 - share) * context

  @property
  def _num_windowed_layers(self) -> int:
    if self.sliding_window is None or self.windowed_layers is None:
      return 0 if self.sliding_window is None else self.num_layers
    return len(self.windowed_layers)

  def unembed_flops(self) -> int:
    """FLOPs of one row of logits."""
    return 2 * self.embed_dim * self.vocab_size

  @classmethod
  def smollm2_135m(cls) -> 'ModelSpec':
    """SmolLM2-135M-Instruct (Allal et al. 2025)."""
    return cls(
      name='SmolLM2-135M-Instruct', num_layers=30, embed_dim=576, query_heads=9, kv_heads=3, head_dim=64,
      ffn_dim=1536, vocab_size=49_152, context_len=8192, rope_theta=100_000.0, tied_embeddings=True, eos_token_ids=(2,),
    )  # fmt: skip

  @classmethod
  def llama3_8b(cls) -> 'ModelSpec':
    """Llama 3.1 8B (Grattafiori et al. 2024), for simulation."""
    return cls(
      name='Llama-3.1-8B', num_layers=32, embed_dim=4096, query_heads=32, kv_heads=8, head_dim=128,
      ffn_dim=14_336, vocab_size=128_256, context_len=131_072, rope_theta=500_000.0, eos_token_ids=(128_009,),
      rope_scaling=RopeScaling('llama3', 8.0),
    )  # fmt: skip

  @classmethod
  def llama3_70b(cls) -> 'ModelSpec':
    """Llama 3.1 70B (Grattafiori et al. 2024), for simulation."""
    return cls(
      name='Llama-3.1-70B', num_layers=80, embed_dim=8192, query_heads=64, kv_heads=8, head_dim=128,
      ffn_dim=28_672, vocab_size=128_256, context_len=131_072, rope_theta=500_000.0, eos_token_ids=(128_009,),
      rope_scaling=RopeScaling('llama3', 8.0),
    )  # fmt: skip

  @classmethod
  def mistral_7b(cls) -> 'ModelSpec':
    """Mistral 7B v0.1 (Jiang et al. 2023), for simulation."""
    return cls(
      name='Mistral-7B-v0.1', num_layers=32, embed_dim=4096, query_heads=32, kv_heads=8, head_dim=128,
      ffn_dim=14_336, vocab_size=32_000, context_len=32_768, eos_token_ids=(2,), sliding_window=4096,
    )  # fmt: skip

  @classmethod
  def qwen2_5_7b(cls) -> 'ModelSpec':
    """Qwen2.5-7B-Instruct (Yang et al. 2024), for simulation."""
    return cls(
      name='Qwen2.5-7B-Instruct', num_layers=28, embed_dim=3584, query_heads=28, kv_heads=4, head_dim=128,
      ffn_dim=18_944, vocab_size=152_064, context_len=32_768, rope_theta=1_000_000.0, norm_eps=1e-6,
      eos_token_ids=(151_645, 151_643), qkv_bias=True,
    )  # fmt: skip

  @classmethod
  def qwen3_8b(cls) -> 'ModelSpec':
    """Qwen3-8B (Yang et al. 2025), for simulation."""
    return cls(
      name='Qwen3-8B', num_layers=36, embed_dim=4096, query_heads=32, kv_heads=8, head_dim=128,
      ffn_dim=12_288, vocab_size=151_936, context_len=40_960, rope_theta=1_000_000.0, norm_eps=1e-6,
      eos_token_ids=(151_645, 151_643), qk_norm=True,
    )  # fmt: skip

  @classmethod
  def qwen3_32b(cls) -> 'ModelSpec':
    """Qwen3-32B (Yang et al. 2025), for simulation."""
    return cls(
      name='Qwen3-32B', num_layers=64, embed_dim=5120, query_heads=64, kv_heads=8, head_dim=128,
      ffn_dim=25_600, vocab_size=151_936, context_len=40_960, rope_theta=1_000_000.0, norm_eps=1e-6,
      eos_token_ids=(151_645, 151_643), qk_norm=True,
    )  # fmt: skip


def mesh_shape(model: ModelSpec, tp: int) -> tuple[int, int]:
  """The sizes of the axes (kv, group) of a worker with `tp` devices.

  Raises:
    ValueError: unless `tp` divides the query heads, and divides the key/value heads or is a multiple of them.
  """
  heads, kv_heads = model.query_heads, model.kv_heads
  fits = [tp for tp in range(1, heads + 1) if heads % tp == 0 and (kv_heads % tp == 0 or tp % kv_heads == 0)]
  if tp not in fits:
    raise ValueError(
      f'tp={tp} does not fit {model.name!r} with {heads} query heads and {kv_heads} key/value heads: tp must divide '
      'the query heads, and divide the key/value heads or be a multiple of them; use one of '
      f'{", ".join(map(str, fits))}.'
    )
  return min(tp, kv_heads), max(tp // kv_heads, 1)


def _are_below(limit: int, values: Any) -> bool:
  return isinstance(values, tuple) and all(type(value) is int and 0 <= value < limit for value in values)
