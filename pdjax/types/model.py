"""The shape of a language model, and what follows from it: parameters, bytes, FLOPs."""

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class ModelSpec:
  """A decoder-only transformer of the Llama family.

  Attributes:
    name: For reports.
    num_layers: Transformer blocks, L.
    embed_dim: Width of the residual stream, E.
    query_heads: Query heads, H.
    kv_heads: Key/value heads, K; divides H (grouped-query attention, Ainslie et al. 2023).
    head_dim: Size of one head, D.
    ffn_dim: Width of the gated feed-forward layer, F.
    vocab_size: Tokens, V.
    context_len: Longest sequence, in tokens.
    rope_theta: Base of the rotary position embedding (Su et al. 2021).
    norm_eps: Epsilon of the RMS norms.
    tied_embeddings: The output projection is the transposed input embedding.
    eos_token_ids: Tokens that end a sequence.

  Raises:
    ValueError: if a size is not positive or the key/value heads do not divide the query heads.
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

  def __post_init__(self):
    sizes = ('num_layers', 'embed_dim', 'query_heads', 'kv_heads', 'head_dim', 'ffn_dim', 'vocab_size', 'context_len')
    for size in sizes:
      if getattr(self, size) < 1:
        raise ValueError(f'model {self.name!r} has {size}={getattr(self, size)}, expected at least 1.')
    if self.query_heads % self.kv_heads:
      raise ValueError(
        f'model {self.name!r} has {self.query_heads} query heads and {self.kv_heads} key/value heads; '
        'the second must divide the first.'
      )

  @property
  def layer_params(self) -> int:
    """Parameters of one block, its two norms included."""
    attention = self.embed_dim * self.head_dim * 2 * (self.query_heads + self.kv_heads)
    return attention + 3 * self.embed_dim * self.ffn_dim + 2 * self.embed_dim

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
    attention = 2 * self.embed_dim * self.head_dim * (self.query_heads // tp + self.kv_heads // kv_shards)
    ffn = 3 * self.embed_dim * self.ffn_dim // (tp if self.ffn_dim % tp == 0 else 1)
    vocab = self.embed_dim * self.vocab_size // (tp if self.vocab_size % tp == 0 else 1)
    layers = self.num_layers * (attention + ffn + 2 * self.embed_dim)
    return (layers + vocab * (1 if self.tied_embeddings else 2) + self.embed_dim) * dtype_bytes

  def kv_bytes_per_token(self, dtype_bytes: int) -> int:
    """Bytes of keys and values that one token leaves in the cache, over all layers."""
    return 2 * self.num_layers * self.kv_heads * self.head_dim * dtype_bytes

  def token_flops(self) -> int:
    """FLOPs of one token's passage through the blocks, attention over the cache left out."""
    return 2 * self.num_layers * self.layer_params

  def attention_flops(self, new_tokens: int, cached_tokens: int) -> int:
    """FLOPs of causal attention for `new_tokens` tokens that follow `cached_tokens` in one sequence."""
    pairs = new_tokens * cached_tokens + new_tokens * (new_tokens + 1) // 2
    return 4 * self.num_layers * self.query_heads * self.head_dim * pairs

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
    )  # fmt: skip

  @classmethod
  def llama3_70b(cls) -> 'ModelSpec':
    """Llama 3.1 70B (Grattafiori et al. 2024), for simulation."""
    return cls(
      name='Llama-3.1-70B', num_layers=80, embed_dim=8192, query_heads=64, kv_heads=8, head_dim=128,
      ffn_dim=28_672, vocab_size=128_256, context_len=131_072, rope_theta=500_000.0, eos_token_ids=(128_009,),
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
