"""ModelSpec: a language model as its parts say it, and what follows from them: parameters, bytes, FLOPs."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

from pdjax.types.cache import CacheKind, KVDtypeName
from pdjax.types.checked import SOME, Index, Positive, Size, check_fields, refusal
from pdjax.types.fitting import Misfit, Must, at_least, fit
from pdjax.types.model import caching, weights
from pdjax.types.model.parts import GQA, Attention, FeedForward, Gated
from pdjax.types.model.presets import Presets
from pdjax.types.model.rope import RopeScaling
from pdjax.types.model.weight import Weight

MAX_LAYERS = 10_000  # no model has a tenth of them: more is a damaged file, and to list them all would take minutes


@dataclasses.dataclass(frozen=True, slots=True, init=False)
class ModelSpec(Presets):
  """A decoder-only transformer, made of parts.

  `ModelSpec(query_heads=9, kv_heads=3, head_dim=64, ffn_dim=1536, ...)` is one of the Llama family, as are Llama,
  SmolLM2, Mistral, Qwen2 and Qwen3: these fields make a `GQA` and a `Gated`, and the engine computes both.

  Attributes:
    name: For reports.
    num_layers: Transformer blocks, L; at most `MAX_LAYERS`.
    embed_dim: Width of the residual stream, E.
    attention: The attention of every layer.
    ffn: The feed-forward part of every layer.
    vocab_size: Tokens, V.
    context_len: Longest sequence, in tokens.
    rope_theta: Base of the rotary position embedding (Su et al. 2021).
    norm_eps: Epsilon of the norms.
    tied_embeddings: The output projection is the transposed input embedding.
    eos_token_ids: Tokens that end a sequence; below V.
    rope_scaling: The stretching of the rotary embedding, if any.
    sliding_window: Tokens that a token sees, itself among them (Mistral, Jiang et al. 2023); None is all before it.
    windowed_layers: The layers with that window; None is every layer.
    learned_positions: Rows of a learned position embedding instead of the rotary one (OPT); 0 is none. Counted only.
    norm_biases: Norms have a bias (OPT). Counted only.
    cache_kinds: The kinds of its cache, where its attention does not say them: for the simulator, which moves and holds
      any mix of them.
  """

  _said: ClassVar[str] = 'model {name} has {field}={value}'

  name: str
  num_layers: Annotated[Size, Must(lambda layers: layers <= MAX_LAYERS, f'at most {MAX_LAYERS:,}')]
  embed_dim: Size
  attention: Attention
  ffn: FeedForward
  vocab_size: Size
  context_len: Size
  rope_theta: Positive
  norm_eps: Positive
  tied_embeddings: bool
  eos_token_ids: tuple[Index, ...]
  rope_scaling: RopeScaling | None
  sliding_window: Annotated[int, at_least(1, 'at least 1 token')] | None
  windowed_layers: tuple[Index, ...] | None
  learned_positions: Annotated[int, at_least(0, 'an integer of at least 0')]
  norm_biases: bool
  cache_kinds: Annotated[tuple[CacheKind, ...], SOME] | None

  def __init__(
    self,
    name: str,
    num_layers: int,
    embed_dim: int,
    query_heads: int | None = None,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    ffn_dim: int | None = None,
    vocab_size: int | None = None,
    context_len: int | None = None,
    rope_theta: float = 10_000.0,
    norm_eps: float = 1e-5,
    tied_embeddings: bool = False,
    eos_token_ids: tuple[int, ...] = (),
    rope_scaling: RopeScaling | None = None,
    sliding_window: int | None = None,
    windowed_layers: tuple[int, ...] | None = None,
    qkv_bias: bool | None = None,
    qk_norm: bool | None = None,
    attention: Attention | None = None,
    ffn: FeedForward | None = None,
    learned_positions: int = 0,
    norm_biases: bool = False,
    cache_kinds: tuple[CacheKind, ...] | None = None,
  ):
    """Make a model of parts, or of the fields of a `GQA` and a `Gated`; fields of a part that is given change it.

    Raises:
      ValueError: if a field is of another kind or out of range, or there is no attention or no feed-forward part.
    """
    for size, given in {'vocab_size': vocab_size, 'context_len': context_len}.items():
      if given is None:
        raise ValueError(f'model {name!r} has no {size}; give it, an integer of at least 1.')
    heads = {'query_heads': query_heads, 'kv_heads': kv_heads, 'head_dim': head_dim}
    set_field = object.__setattr__
    set_field(self, 'name', name)
    for size, given in (heads | {'ffn_dim': ffn_dim}).items():
      try:
        fit(given, Size | None)
      except Misfit as misfit:
        raise refusal(self, size, misfit) from None
    try:
      more = heads | {'qkv_bias': qkv_bias, 'qk_norm': qk_norm}
      set_field(self, 'attention', _with_fields(GQA, 'attention', attention, more))
      set_field(self, 'ffn', _with_fields(Gated, 'ffn', ffn, {'dim': ffn_dim}))
    except (TypeError, ValueError) as error:
      raise ValueError(f'model {name!r}: {error}') from error
    fields: tuple[tuple[str, Any], ...] = (
      ('num_layers', num_layers), ('embed_dim', embed_dim), ('vocab_size', vocab_size), ('context_len', context_len),
      ('rope_theta', rope_theta), ('norm_eps', norm_eps), ('tied_embeddings', tied_embeddings),
      ('eos_token_ids', eos_token_ids), ('rope_scaling', rope_scaling), ('sliding_window', sliding_window),
      ('windowed_layers', windowed_layers), ('learned_positions', learned_positions), ('norm_biases', norm_biases),
      ('cache_kinds', cache_kinds),
    )  # fmt: skip
    for field, value in fields:
      set_field(self, field, value)
    self._check()

  def _check(self) -> None:
    check_fields(self)
    self._expect(
      'eos_token_ids',
      all(token < self.vocab_size for token in self.eos_token_ids),
      f'a tuple of integers from 0 to {self.vocab_size - 1}, as its vocabulary has',
    )
    self._expect(
      'windowed_layers',
      all(layer < self.num_layers for layer in self.windowed_layers or ()),
      f'None or a tuple of its layers, 0 to {self.num_layers - 1}',
    )
    if self.cache_kinds is not None:
      caching.check_kinds(self.name, self.num_layers, kinds := self.cache_kinds)
      object.__setattr__(self, 'cache_kinds', None)
      if kinds != caching.derived(self):  # else they say nothing new
        object.__setattr__(self, 'cache_kinds', kinds)

  def __hash__(self) -> int:
    """Of all fields, worked out once: what is worked out of a model is kept by it."""
    if not hasattr(self, '_hash'):
      object.__setattr__(self, '_hash', hash(tuple(getattr(self, field.name) for field in dataclasses.fields(self))))
    return self._hash

  def _expect(self, field: str, holds: bool, expected: str) -> None:
    if not holds:
      raise ValueError(f'model {self.name!r} has {field}={getattr(self, field)!r}, expected {expected}.')

  # -------------------------------------------------------------------------- its parts, by the names of their fields

  @property
  def query_heads(self) -> int:
    """Query heads, H."""
    return self.attention.query_heads

  @property
  def kv_heads(self) -> int:
    """Heads over which the cache can be cut, K."""
    return self.attention.kv_heads

  @property
  def head_dim(self) -> int:
    """Features of a query head, D."""
    return self.attention.head_dim

  @property
  def ffn_dim(self) -> int:
    """Inner width of the feed-forward layer, or of each expert, F."""
    return self.ffn.dim

  @property
  def qkv_bias(self) -> bool:
    """Whether queries, keys and values have a bias."""
    return isinstance(self.attention, GQA) and self.attention.qkv_bias

  @property
  def qk_norm(self) -> bool:
    """Whether each head of the queries and keys is normed."""
    return isinstance(self.attention, GQA) and self.attention.qk_norm

  @property
  def only_simulated(self) -> str | None:
    """The part of it that the engine does not compute, in words; None if it computes the whole model."""
    if self.learned_positions:
      return 'learned positions'
    if self.norm_biases:
      return 'norms with biases'
    if self.cache_kinds is not None:
      return f'the cache kinds {", ".join(kind.name for kind in self.cache_kinds)}'
    return self.attention.only_simulated or self.ffn.only_simulated

  def check_computed(self) -> None:
    """Raise ValueError if the model has a part that the engine does not compute."""
    if (part := self.only_simulated) is not None:
      raise ValueError(
        f'{self.name} has {part}, which the engine does not compute; simulate it (pdjax.simulate, or '
        '--backend=simulator), or serve a model without.'
      )

  def window(self, layer: int) -> int | None:
    """Tokens that a token sees in this layer, itself among them; None is all before it."""
    return self.sliding_window if self.windowed_layers is None or layer in self.windowed_layers else None

  def flat(self) -> dict[str, Any]:
    """The fields of the constructor that make it, those of its parts among them where it is of the Llama family."""
    fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    attention, ffn = self.attention, self.ffn
    if not (isinstance(attention, GQA) and isinstance(ffn, Gated)) or self.only_simulated:
      return fields
    for rest in ('attention', 'ffn', 'learned_positions', 'norm_biases', 'cache_kinds'):
      del fields[rest]
    heads = {name: getattr(attention, name) for name in ('query_heads', 'kv_heads', 'head_dim', 'qkv_bias', 'qk_norm')}
    return fields | heads | {'ffn_dim': ffn.dim}

  # -------------------------------------------------------------------------- weights

  @property
  def weights(self) -> Mapping[str, Weight]:
    """Every weight of the model by its dotted name, those of layer 3 as `layers.3.q` and so on."""
    return weights.table(self)

  def outer_weights(self) -> tuple[Weight, ...]:
    """The weights outside of the blocks, by their names."""
    return weights.outer_weights(self)

  def layer_weights(self, layer: int = 0) -> tuple[Weight, ...]:
    """The weights of one block, by their names in it."""
    return weights.layer_weights(self, layer)

  @property
  def layer_params(self) -> int:
    """Parameters of one block, its norms and biases included; the mean, where blocks differ."""
    return round(weights.totals(self).layers / self.num_layers)

  @property
  def num_params(self) -> int:
    """Parameters of the whole model."""
    sums = weights.totals(self)
    return sums.layers + sums.outer

  def weight_bytes(self, dtype_bytes: int) -> int:
    """Bytes of all weights at this many bytes each."""
    return self.num_params * dtype_bytes

  def read_params(self, tokens: int) -> float:
    """Parameters that a step of so many tokens reads: of experts, those that some token is expected to choose.

    Each token is taken to choose its experts at random, and the input embedding is read whole where it is tied.
    """
    sums = weights.totals(self)
    experts = sum(size * (1 - (1 - share) ** tokens) for share, size in sums.experts)
    embedding = 0 if self.tied_embeddings else self.vocab_size * self.embed_dim  # a row a token, not whole
    return sums.layers - sum(size for _, size in sums.experts) + experts + sums.outer - embedding

  def weight_bytes_per_device(self, dtype_bytes: int, tp: int) -> int:
    """Bytes of the weights on each of `tp` devices: what `tp` does not divide lies whole on all of them.

    Raises:
      ValueError: if `tp` does not fit the heads.
    """
    shards = weights.axis_shards(self, tp)

    def part(row: Weight) -> int:
      return row.size // max(shards.get(axis, 1) for axis in row.axes)

    layers = round(weights.sum_over_layers(self, part))
    return (layers + sum(map(part, self.outer_weights()))) * dtype_bytes

  # -------------------------------------------------------------------------- cache

  @property
  def cache(self) -> tuple[CacheKind, ...]:
    """The kinds of what its tokens leave behind.

    Of a model that the engine computes that is one, 'kv', the keys and values of all tokens in every layer: the engine
    keeps them past a window, too. Of others, layers with a window have a kind of their own.
    """
    return caching.kinds(self)

  def cached_token_bytes(self, kv_dtype: KVDtypeName) -> int:
    """Bytes that every token adds to the cache, over all layers: of int8, the float32 scales too."""
    return caching.cache_bytes(self, kv_dtype).token

  def cached_request_bytes(self, kv_dtype: KVDtypeName) -> int:
    """Most bytes that a request has in the cache beside those of `cached_token_bytes`: full windows, and states."""
    return caching.cache_bytes(self, kv_dtype).request

  def cached_bytes(self, tokens: int, kv_dtype: KVDtypeName) -> int:
    """Bytes that a sequence of so many tokens has in the cache."""
    return sum(kind.kept(tokens) * kind.num_bytes(kv_dtype) for kind in self.cache)

  def read_bytes(
    self, kv_dtype: KVDtypeName, chunks: Sequence[tuple[int, int]], contexts: Sequence[int], shards: int = 1
  ) -> int:
    """Bytes of the cache that one step reads on each device, and of states those that it writes back.

    Args:
      kv_dtype: Of the cache.
      chunks: (tokens already cached, new tokens) of each prompt chunk.
      contexts: Cached tokens of each decoding sequence.
      shards: Devices that cut the heads; what is not cut, each of them reads whole.
    """
    reads = caching.cache_bytes(self, kv_dtype, shards)
    total = 2 * reads.state * (len(chunks) + len(contexts))
    for window, size in reads.by_window:
      if window is None:
        total += size * (sum(contexts) + sum(cached + new for cached, new in chunks))
      else:
        total += size * sum(min(context, window) for context in contexts)
        total += size * sum(min(cached, window) + new for cached, new in chunks)
    return total

  # -------------------------------------------------------------------------- FLOPs

  def token_flops(self) -> int:
    """FLOPs of one token's way through the blocks, attention over the cache left out; of experts, the active ones."""
    return 2 * weights.totals(self).token

  def attention_flops(self, new_tokens: int, cached_tokens: int) -> int:
    """FLOPs of causal attention for `new_tokens` tokens that follow `cached_tokens` in one sequence."""
    total = 0
    for window, layers in caching.attention_layers(self):
      pairs, seen = new_tokens * cached_tokens + new_tokens * (new_tokens + 1) // 2, cached_tokens
      if window is not None:  # tokens at position `window` and up miss what lies before their window
        first, last = max(cached_tokens + 1 - window, 1), cached_tokens + new_tokens - window
        pairs -= max(last - first + 1, 0) * (first + last) // 2
        seen = min(cached_tokens, window)
      total += layers * self.attention.flops(pairs, seen)
    return total

  def decode_attention_flops(self, contexts: Sequence[int]) -> int:
    """FLOPs of attention for one more token of each sequence, which have so many cached tokens; all together."""
    total = 0
    for window, layers in caching.attention_layers(self):
      if window is None:
        seen = sum(contexts)
        pairs = seen + len(contexts)
      else:
        seen = sum(min(context, window) for context in contexts)
        pairs = sum(min(context + 1, window) for context in contexts)
      total += layers * self.attention.flops(pairs, seen)
    return total

  def unembed_flops(self) -> int:
    """FLOPs of one row of logits."""
    return 2 * self.embed_dim * self.vocab_size


def _with_fields(kind: type, name: str, part: Any, fields: dict[str, Any]) -> Any:
  """A part with those fields that are given; one of this kind if there is none yet."""
  given = {field: value for field, value in fields.items() if value is not None}
  if part is None:
    needed = [field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING]
    missing = [field for field in needed if field not in given]
    if missing:
      raise ValueError(f'a {kind.__name__} needs {", ".join(missing)}; give these, or the part itself as {name}.')
    return kind(**given)
  known = {field.name for field in dataclasses.fields(part)} if dataclasses.is_dataclass(part) else set()
  if others := [name for name in given if name not in known]:
    raise ValueError(f'its {type(part).__name__} has no {", ".join(others)}; give another part, or leave that out.')
  return dataclasses.replace(part, **given) if given else part
