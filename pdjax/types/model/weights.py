"""The weights table: every weight of a model, said once. Layers, checkpoints, sizes and shardings read it."""

import dataclasses
import functools
import types
from collections.abc import Callable, Mapping
from typing import Protocol

from pdjax.types.model.parts import Attention, Experts, FeedForward
from pdjax.types.model.weight import Axis, Weight, bias, norm


class Shape(Protocol):
  """The fields of `ModelSpec` that the table is made of."""

  @property
  def name(self) -> str: ...
  @property
  def num_layers(self) -> int: ...
  @property
  def embed_dim(self) -> int: ...
  @property
  def attention(self) -> Attention: ...
  @property
  def ffn(self) -> FeedForward: ...
  @property
  def vocab_size(self) -> int: ...
  @property
  def tied_embeddings(self) -> bool: ...
  @property
  def learned_positions(self) -> int: ...
  @property
  def norm_biases(self) -> bool: ...


def layer_weights(model: Shape, layer: int) -> tuple[Weight, ...]:
  """The weights of one block by their names in it: norms, attention, feed-forward."""
  norms = [norm(name, model.embed_dim) for name in ('attn_norm', 'mlp_norm')]
  if model.norm_biases:
    norms += [bias(f'{name}_bias', {'embed': model.embed_dim}) for name in ('attn_norm', 'mlp_norm')]
  return (*norms, *model.attention.weights(model.embed_dim), *model.ffn.weights(model.embed_dim, layer))


def outer_weights(model: Shape) -> tuple[Weight, ...]:
  """The weights outside of the blocks: embeddings, the last norm, the output projection unless it is tied."""
  embed, vocab = model.embed_dim, model.vocab_size
  rows = [Weight('embed', ('vocab', 'embed'), (vocab, embed), 'embedding')]
  if model.learned_positions:
    rows.append(Weight('positions', ('position', 'embed'), (model.learned_positions, embed), 'embedding'))
  rows.append(norm('final_norm', embed))
  if model.norm_biases:
    rows.append(bias('final_norm_bias', {'embed': embed}))
  if not model.tied_embeddings:
    rows.append(Weight('unembed', ('vocab', 'embed'), (vocab, embed)))
  return tuple(rows)


@functools.lru_cache(maxsize=16)
def table(model: Shape) -> Mapping[str, Weight]:
  """Every weight by its dotted name: `embed`, then `layers.0.attn_norm` and so on, then those behind the blocks."""
  first, *rest = outer_weights(model)
  rows = {first.name: first}
  for layer in range(model.num_layers):
    for row in layer_weights(model, layer):
      name = f'layers.{layer}.{row.name}'
      rows[name] = dataclasses.replace(row, name=name)
  return types.MappingProxyType(rows | {row.name: row for row in rest})


@dataclasses.dataclass(frozen=True, slots=True)
class Totals:
  """Sums over the table.

  Attributes:
    layers: Parameters of all blocks.
    outer: Parameters outside of them.
    token: Parameters of the blocks by which one token is multiplied: of experts, those of the active ones.
    experts: The share of experts that a token goes through, and the parameters of all of them.
  """

  layers: int
  outer: int
  token: int
  experts: tuple[tuple[float, int], ...]


@functools.lru_cache(maxsize=16)
def totals(model: Shape) -> Totals:
  """The sums over a model's table, worked out once: a simulator asks for them in every step."""
  token = round(sum_over_layers(model, lambda row: row.size * row.share))
  outer = sum(row.size for row in outer_weights(model))
  shares = {row.share for layer in (0, model.num_layers - 1) for row in layer_weights(model, layer)} - {1.0}

  def of_share(share: float) -> int:
    return round(sum_over_layers(model, lambda row: row.size * (row.share == share)))

  experts = tuple((share, of_share(share)) for share in sorted(shares))
  return Totals(round(sum_over_layers(model, lambda row: row.size)), outer, token, experts)


def sum_over_layers(model: Shape, of: Callable[[Weight], float]) -> float:
  """A sum over the weights of all blocks, equal blocks looked at once."""
  first = min(model.ffn.dense_layers, model.num_layers) if isinstance(model.ffn, Experts) else 0
  kinds = range(first), range(first, model.num_layers)
  return sum(len(layers) * sum(map(of, layer_weights(model, layers[0]))) for layers in kinds if layers)


def axis_shards(model: Shape, tp: int) -> dict[Axis, int]:
  """The shards into which `tp` devices cut an axis; one that is not there is whole on every device.

  Raises:
    ValueError: if `tp` does not fit the heads.
  """
  kv_shards, _ = mesh_shape(model, tp)
  return {'query_heads': tp, 'kv_heads': kv_shards, **dict.fromkeys(evenly_cut(model, tp), tp)}


def evenly_cut(model: Shape, tp: int) -> tuple[Axis, ...]:
  """The axes that are cut over all of `tp` devices if that divides them, and are whole on each otherwise."""
  lengths: dict[Axis, int] = {'ffn': model.ffn.dim, 'vocab': model.vocab_size}
  return tuple(axis for axis, length in lengths.items() if length % tp == 0)


def mesh_shape(model: Shape, tp: int) -> tuple[int, int]:
  """The sizes of the axes (kv, group) of a worker with `tp` devices.

  Raises:
    ValueError: unless `tp` divides the query heads, and divides the key/value heads or is a multiple of them.
  """
  heads, kv_heads = model.attention.query_heads, model.attention.kv_heads
  fits = [tp for tp in range(1, heads + 1) if heads % tp == 0 and (kv_heads % tp == 0 or tp % kv_heads == 0)]
  if tp not in fits:
    raise ValueError(
      f'tp={tp} does not fit {model.name!r} with {heads} query heads and {kv_heads} key/value heads: tp must divide '
      'the query heads, and divide the key/value heads or be a multiple of them; use one of '
      f'{", ".join(map(str, fits))}.'
    )
  return min(tp, kv_heads), max(tp // kv_heads, 1)
