"""The parts of a layer: kinds of attention and of feed-forward layers, with their rows of the weights table."""

import dataclasses
from typing import Annotated

from pdjax.types.cache import KV, CacheArray
from pdjax.types.checked import Size, check_fields
from pdjax.types.fitting import Must, at_least
from pdjax.types.model.weight import Axis, Weight, bias, matrix, norm

MAX_HEADS = 65_536  # no model has a tenth of them: more is a mistake, and to look for their divisors would take long

Heads = Annotated[Size, Must(lambda heads: heads <= MAX_HEADS, f'at most {MAX_HEADS:,}')]
_SizeOrZero = Annotated[int, at_least(0, 'an integer of at least 0')]


@dataclasses.dataclass(frozen=True, slots=True)
class GQA:
  """Grouped-query attention (Ainslie et al. 2023): several query heads read one head of keys and values.

  Attributes:
    query_heads: Query heads, H.
    kv_heads: Key/value heads, K; divides H.
    head_dim: Size of one head, D; even, because the rotary embedding turns pairs.
    qkv_bias: Queries, keys and values have a bias (Qwen2).
    qk_norm: Each head of the queries and keys passes an RMS norm before it is turned (Qwen3).
    out_bias: The output projection has a bias; counted only.
    sinks: Each query head has a logit of its own in the softmax (GPT-OSS); counted only.

  Raises:
    ValueError: if a field is of another kind or out of range, or the key/value heads do not divide the query heads.
  """

  query_heads: Heads
  kv_heads: Heads
  head_dim: Size
  qkv_bias: bool = False
  qk_norm: bool = False
  out_bias: bool = False
  sinks: bool = False

  def __post_init__(self):
    check_fields(self)
    if self.head_dim % 2:
      raise ValueError(f'GQA has head_dim={self.head_dim}, expected an even number, as its features turn in pairs.')
    if self.query_heads % self.kv_heads:
      raise ValueError(
        f'GQA has {self.query_heads} query heads and {self.kv_heads} key/value heads; the second must divide the first.'
      )

  @property
  def only_simulated(self) -> str | None:
    """The feature of it that the engine does not compute, in words; None if it computes all."""
    return 'a bias of the output projection' if self.out_bias else 'attention sinks' if self.sinks else None

  @property
  def pair_flops(self) -> int:
    """FLOPs of one query token with one cached token, over all heads."""
    return 4 * self.query_heads * self.head_dim

  def flops(self, pairs: int, cached: int) -> int:
    """FLOPs of so many pairs of a query token and a token that it sees."""
    return pairs * self.pair_flops

  @property
  def cache(self) -> tuple[str, tuple[CacheArray, ...]]:
    """The cache of a layer: the name of its kind, and the arrays that a token has there."""
    return KV, (CacheArray('kv', (2, self.kv_heads, self.head_dim), cut=1),)

  def weights(self, embed_dim: int) -> tuple[Weight, ...]:
    """Its rows of the table in a model of this width."""
    heads, kv_heads, head = self.query_heads, self.kv_heads, self.head_dim
    rows = [
      matrix('q', {'query_heads': heads, 'head': head}, {'embed': embed_dim}),
      matrix('k', {'kv_heads': kv_heads, 'head': head}, {'embed': embed_dim}),
      matrix('v', {'kv_heads': kv_heads, 'head': head}, {'embed': embed_dim}),
      matrix('o', {'embed': embed_dim}, {'query_heads': heads, 'head': head}),
    ]
    if self.qkv_bias:
      rows.append(bias('q_bias', {'query_heads': heads, 'head': head}))
      rows += [bias(name, {'kv_heads': kv_heads, 'head': head}) for name in ('k_bias', 'v_bias')]
    if self.out_bias:
      rows.append(bias('o_bias', {'embed': embed_dim}))
    if self.qk_norm:
      rows += [norm('q_norm', head, 'head'), norm('k_norm', head, 'head')]
    if self.sinks:
      rows.append(bias('sinks', {'query_heads': heads}))
    return tuple(rows)


@dataclasses.dataclass(frozen=True, slots=True)
class MLA:
  """Multi-head latent attention (DeepSeek-V2, Liu et al. 2024): one latent vector a token stands for all heads.

  For counts, bytes and FLOPs; the engine does not compute it.

  Attributes:
    query_heads: Query heads, H.
    query_rank: Width of the queries' latent; None projects them at once.
    kv_rank: Width of the latent that keys and values are made of.
    nope_dim: Features of a head that are not turned.
    rope_dim: Features that are turned; those of the keys are one for all heads.
    value_dim: Features of a head's values.

  Raises:
    ValueError: if a field is of another kind or out of range.
  """

  query_heads: Heads
  query_rank: Size | None
  kv_rank: Size
  nope_dim: Size
  rope_dim: Size
  value_dim: Size

  def __post_init__(self):
    check_fields(self)

  @property
  def kv_heads(self) -> int:
    """1: the latent is one for all heads, and no device can have a part of it."""
    return 1

  @property
  def head_dim(self) -> int:
    """Features of a query head, turned or not."""
    return self.nope_dim + self.rope_dim

  @property
  def only_simulated(self) -> str:
    """The engine does not compute it."""
    return 'multi-head latent attention'

  @property
  def pair_flops(self) -> int:
    """FLOPs of one query token with one cached token, over all heads, keys and values made of the latent before."""
    return 2 * self.query_heads * (self.nope_dim + self.rope_dim + self.value_dim)

  def flops(self, pairs: int, cached: int) -> int:
    """FLOPs of so many pairs of a query token and a token that it sees, of which so many are cached.

    Keys and values of the cached tokens are made anew, or queries and values meet the latent itself (the absorbed
    form), whichever is less.
    """
    made = pairs * self.pair_flops + cached * 2 * self.kv_rank * self.query_heads * (self.nope_dim + self.value_dim)
    return min(made, pairs * 2 * self.query_heads * (2 * self.kv_rank + self.rope_dim))

  @property
  def cache(self) -> tuple[str, tuple[CacheArray, ...]]:
    """The cache of a layer: the name of its kind, and the arrays that a token has there, whole on every device."""
    return 'latent', (CacheArray('latent', (self.kv_rank + self.rope_dim,)),)

  def weights(self, embed_dim: int) -> tuple[Weight, ...]:
    """Its rows of the table in a model of this width."""
    heads = self.query_heads
    inputs: dict[Axis, int] = {'embed': embed_dim}
    rows = []
    if self.query_rank is not None:
      rows += [matrix('q_down', {'latent': self.query_rank}, {'embed': embed_dim})]
      rows += [norm('q_down_norm', self.query_rank, 'latent')]
      inputs = {'latent': self.query_rank}
    return (
      *rows,
      matrix('q', {'query_heads': heads, 'head': self.head_dim}, inputs),
      matrix('kv_down', {'latent': self.kv_rank + self.rope_dim}, {'embed': embed_dim}),
      norm('kv_down_norm', self.kv_rank, 'latent'),
      matrix('kv', {'query_heads': heads, 'head': self.nope_dim + self.value_dim}, {'latent': self.kv_rank}),
      matrix('o', {'embed': embed_dim}, {'query_heads': heads, 'head': self.value_dim}),
    )


Attention = GQA | MLA


@dataclasses.dataclass(frozen=True, slots=True)
class Gated:
  """A gated feed-forward layer (SwiGLU, Shazeer 2020).

  Attributes:
    dim: Its inner width, F.

  Raises:
    ValueError: if that is no integer of at least 1.
  """

  dim: Size

  def __post_init__(self):
    check_fields(self)

  @property
  def only_simulated(self) -> None:
    """The engine computes it."""
    return None

  def weights(self, embed_dim: int, layer: int) -> tuple[Weight, ...]:
    """Its rows of the table in a layer of a model of this width."""
    return _gated(embed_dim, self.dim)


@dataclasses.dataclass(frozen=True, slots=True)
class Plain:
  """A feed-forward layer of two matrices with biases (Vaswani et al. 2017; OPT), for counts, bytes and FLOPs.

  Attributes:
    dim: Its inner width, F.

  Raises:
    ValueError: if that is no integer of at least 1.
  """

  dim: Size

  def __post_init__(self):
    check_fields(self)

  @property
  def only_simulated(self) -> str:
    """The engine does not compute it."""
    return 'a feed-forward layer without a gate'

  def weights(self, embed_dim: int, layer: int) -> tuple[Weight, ...]:
    """Its rows of the table in a layer of a model of this width."""
    return (
      matrix('up', {'ffn': self.dim}, {'embed': embed_dim}),
      bias('up_bias', {'ffn': self.dim}),
      matrix('down', {'embed': embed_dim}, {'ffn': self.dim}),
      bias('down_bias', {'embed': embed_dim}),
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Experts:
  """A mixture of gated experts (Shazeer et al. 2017; Mixtral, Jiang et al. 2024), for counts, bytes and FLOPs.

  Attributes:
    count: The experts of a layer.
    active: Those that each token goes through.
    dim: The inner width of each.
    shared_dim: The inner width of an expert that all tokens go through; 0 is none (DeepSeekMoE, Dai et al. 2024).
    dense_layers: The first layers, so many, that have one gated layer instead.
    dense_dim: The inner width of that.
    biases: Experts and router have biases (GPT-OSS).
    router_bias: The router has a bias by which experts are chosen (DeepSeek-V3).

  Raises:
    ValueError: if a field is of another kind or out of range.
  """

  count: Size
  active: Size
  dim: Size
  shared_dim: _SizeOrZero = 0
  dense_layers: _SizeOrZero = 0
  dense_dim: _SizeOrZero = 0
  biases: bool = False
  router_bias: bool = False

  def __post_init__(self):
    check_fields(self)
    if self.active > self.count:
      raise ValueError(f'Experts has active={self.active}, expected at most count={self.count}.')
    if bool(self.dense_layers) != bool(self.dense_dim):
      raise ValueError(
        f'Experts has dense_layers={self.dense_layers} and dense_dim={self.dense_dim}; give both, or neither.'
      )

  @property
  def only_simulated(self) -> str:
    """The engine does not compute it."""
    return 'a mixture of experts'

  def weights(self, embed_dim: int, layer: int) -> tuple[Weight, ...]:
    """Its rows of the table in a layer of a model of this width."""
    if layer < self.dense_layers:
      return _gated(embed_dim, self.dense_dim)
    count, share = self.count, self.active / self.count
    rows = [matrix('router', {'experts': count}, {'embed': embed_dim})]
    if self.biases or self.router_bias:
      rows.append(bias('router_bias', {'experts': count}))
    rows += [
      Weight('expert_gate', ('experts', 'ffn', 'embed'), (count, self.dim, embed_dim), share=share),
      Weight('expert_up', ('experts', 'ffn', 'embed'), (count, self.dim, embed_dim), share=share),
      Weight('expert_down', ('experts', 'embed', 'ffn'), (count, embed_dim, self.dim), share=share),
    ]
    if self.biases:
      inner: dict[Axis, int] = {'experts': count, 'ffn': self.dim}
      rows += [bias(name, inner, share) for name in ('expert_gate_bias', 'expert_up_bias')]
      rows.append(bias('expert_down_bias', {'experts': count, 'embed': embed_dim}, share))
    shared = _gated(embed_dim, self.shared_dim, 'shared_') if self.shared_dim else ()
    return (*rows, *shared)


FeedForward = Gated | Plain | Experts


def _gated(embed_dim: int, dim: int, prefix: str = '') -> tuple[Weight, ...]:
  return (
    matrix(f'{prefix}gate', {'ffn': dim}, {'embed': embed_dim}),
    matrix(f'{prefix}up', {'ffn': dim}, {'embed': embed_dim}),
    matrix(f'{prefix}down', {'embed': embed_dim}, {'ffn': dim}),
  )
