"""cuDNN's fused attention, as XLA calls it: the one place that knows the name and the words of that call.

JAX's own wrapper (`jax.nn.dot_product_attention`) rounds the logarithm of a softmax's sum to the dtype of q, wants
queries and keys in one order of axes, and refuses a pool that has more blocks than its tables name. So the call is made
here, by what `jax.ffi` makes public. Tests compare it with what JAX makes of the same problem, where JAX can say it:
queries by row over pages by head, each axis as it lies, it cannot. `cudnn_trial.py` says when to rely on it.
"""

import json

import jax
import jax.numpy as jnp
from jax.ffi import ffi_call

from pallas_kernels.layouts import PageLayout
from pallas_kernels.online_softmax import NOTHING, Seen, finish, gather_values, prepare, read, restore, weigh

TARGET = '__cudnn$fmhaSoftmax'
TYPES = {'bfloat16': 'BF16', 'float16': 'F16'}

Lse = jax.Array | None


# ---------------------------------------------------------------------------- the call


def attend(
  q: jax.Array,
  keys: jax.Array,
  values: jax.Array,
  query_lengths: jax.Array,
  lengths: jax.Array,
  *,
  softmax_scale: float,
  causal: bool = False,
  tables: tuple[jax.Array, jax.Array] | None = None,
  heads_first: bool = False,
  return_lse: bool = False,
) -> tuple[jax.Array, Lse]:
  """Attend from rows of X problems to each one's keys and values.

  Args:
    q: `[X, R, H, D]`, or `[X, H, R, D]` with `heads_first`.
    keys: `[X, S, K, D]`; with `tables` any number of pages `[Y, K, G, D]`.
    values: The same.
    query_lengths: `[X]` int32, rows of q that count, at least 1; the others come back undefined.
    lengths: `[X]` int32, keys that count, at least 1.
    softmax_scale: Multiplies the scores.
    causal: Row i sees the keys up to i alone, wherever either ends.
    tables: `[X, N]` int32 each, the pages of a problem's keys and those of its values.
    heads_first: Whether heads come before tokens in q.
    return_lse: Also return the logarithm of each softmax's sum.

  Returns:
    An array like q, and `[X, H, R]` float32 or None.
  """
  count, *rest, head_dim = q.shape
  heads, rows = rest if heads_first else reversed(rest)
  masked = 'PADDING_CAUSAL' if causal else 'PADDING'
  backend_config = config(
    (count, heads, rows, keys.shape[2 if tables else 1]),
    q.dtype.name,
    float(softmax_scale),
    masked,
    heads_first=heads_first,
    paged=tables is not None,
  )
  numbers = [query_lengths, lengths]
  if tables is not None:
    numbers += [table[:, None, :, None] for table in tables]
  operands = [q, keys, values, *(one.astype(jnp.int32) for one in numbers)]  # XLA tells cuDNN that they are
  results = [jax.ShapeDtypeStruct((count, heads, rows, head_dim), q.dtype)]
  layouts: list[tuple[int, ...]] = [(0, 1, 2, 3) if heads_first else (0, 2, 1, 3)]
  if return_lse:
    results.append(jax.ShapeDtypeStruct((count, heads, rows), jnp.float32))
    layouts.append((0, 1, 2))
  results.append(jax.ShapeDtypeStruct((0,), jnp.uint8))  # XLA makes it the room that cuDNN asks for
  layouts.append((0,))
  call = ffi_call(
    TARGET,
    results,
    output_layouts=layouts,
    vmap_method='sequential',
    custom_call_api_version=2,
    legacy_backend_config=json.dumps(backend_config),
  )
  out, *others = call(*operands)
  return out if heads_first else out.transpose(0, 2, 1, 3), others[0] if return_lse else None


def config(
  scores: tuple[int, int, int, int],
  dtype: str,
  softmax_scale: float,
  masked: str,
  *,
  heads_first: bool,
  paged: bool,
) -> dict:
  """The config of a call for XLA: the scores' shape `[X, H, R, S]`, their type, and the order of the operands' axes.

  Heads come before tokens in queries with `heads_first`, and in keys and values where they are `paged`.
  """

  def product(lhs: tuple[int, int], rhs: tuple[int, int]) -> dict[str, list[str]]:
    """Numbers of a product, of operands given as their contracted axis and that of the heads."""
    return {
      'lhs_contracting_dimensions': [str(lhs[0])],
      'rhs_contracting_dimensions': [str(rhs[0])],
      'lhs_batch_dimensions': ['0', str(lhs[1])],
      'rhs_batch_dimensions': ['0', str(rhs[1])],
    }

  queries, keys = 1 if heads_first else 2, 1 if paged else 2  # the axis of heads
  return {
    'operation_queue_id': '0',
    'cudnn_fmha_backend_config': {
      'algorithm': {
        'algo_id': '0',
        'math_type': 'TENSOR_OP_MATH',
        'tuning_knobs': {'17': '1', '24': '0'},
        'is_cudnn_frontend': True,
        'workspace_size': '0',
      },
      'fmha_scale': softmax_scale,
      'intermediate_tensor_shape': {
        'element_type': TYPES[dtype],
        'dimensions': [str(size) for size in scores],
        'tuple_shapes': [],
        'layout': {
          'dim_level_types': [],
          'dim_unique': [],
          'dim_ordered': [],
          'minor_to_major': ['3', '2', '1', '0'],
          'tiles': [],
          'element_size_in_bits': '0',
          'memory_space': '0',
          'index_primitive_type': 'PRIMITIVE_TYPE_INVALID',
          'pointer_primitive_type': 'PRIMITIVE_TYPE_INVALID',
          'dynamic_shape_metadata_prefix_bytes': '0',
        },
        'is_dynamic_dimension': [False] * 4,
      },
      'is_flash_attention': True,
      'mask_type': masked,
      'bmm1_dot_dimension_numbers': product((3, queries), (3, keys)),
      'bmm2_dot_dimension_numbers': product((3, 1), (3 - keys, keys)),
      'dropout_rate': 0.0,
      'seed': 42,
      'sliding_window_length': 0,
      'max_seg_per_batch': 1,
      'is_paged_attention': paged,
    },
  }


# ---------------------------------------------------------------------------- pages


def attend_pages(
  q: jax.Array,
  pages: jax.Array,
  tables: jax.Array,
  query_lengths: jax.Array,
  lengths: jax.Array,
  *,
  softmax_scale: float,
  heads_first: bool = False,
  apart: bool = True,
) -> tuple[jax.Array, jax.Array]:
  """Attend, without a mask, from rows of X problems to the tokens in each one's pages.

  The keys and the values of a page follow one another, so that a pool of P pages is one of 2P blocks, keys in the even
  ones: nothing is copied.

  Args:
    q: `[X, R, H, D]`, or `[X, H, R, D]` with `heads_first`.
    pages: `[P, 2, K, G, D]`.
    tables: `[X, N]` int32.
    query_lengths: `[X]` int32, rows of q that count, at least 1; the others come back undefined.
    lengths: `[X]` int32 tokens, at most N·G.
    softmax_scale: Multiplies the scores.
    heads_first: Whether heads come before tokens in q.
    apart: cuDNN sees full pages alone, and a last page that is not full is multiplied apart. Then nobody reads what
      stands where no token is, which may be NaN, of which 0 times is NaN too.

  Returns:
    An array like q, in float32 where two parts were joined, and the logarithm of each softmax's sum, `[X, R, H]` or
    `[X, H, R]` float32: zeros and -inf over no tokens.
  """
  num_pages, _, _, page_size, _ = pages.shape
  tables = jnp.clip(tables, 0, num_pages - 1)
  full = lengths // page_size
  seen, read = lengths, tables
  if apart:  # a block of keys may reach behind the last of them, into pages that are anyone's
    behind = jnp.arange(tables.shape[1]) >= jnp.maximum(full, 1)[:, None]
    seen, read = full * page_size, jnp.where(behind, tables[:, :1], tables)
  blocks = pages.reshape(-1, *pages.shape[2:])
  out, lse = attend(
    q, blocks, blocks, query_lengths, jnp.maximum(seen, 1),
    softmax_scale=softmax_scale, tables=(2 * read, 2 * read + 1), heads_first=heads_first, return_lse=True,
  )  # fmt: skip
  assert lse is not None
  any_seen = (seen > 0)[:, None, None]
  lse = jnp.where(any_seen, lse if heads_first else jnp.moveaxis(lse, 1, 2), -jnp.inf)
  out = jnp.where(any_seen[..., None], out, 0)
  if not apart:
    return out, lse
  last = jnp.take_along_axis(tables, jnp.minimum(full, tables.shape[1] - 1)[:, None], axis=1)[:, 0]
  return merge(out, lse, *_attend_page(q, pages, last, lengths - seen, softmax_scale, heads_first))


def _attend_page(
  q: jax.Array, pages: jax.Array, ids: jax.Array, lengths: jax.Array, softmax_scale: float, heads_first: bool
) -> tuple[jax.Array, jax.Array]:
  """As `attend_pages`, to the first tokens of one page of each, `ids` `[X]`, as products."""
  q = jnp.moveaxis(q, 1, 2) if heads_first else q
  layout = PageLayout.of(pages.shape, q.shape[-1])
  held = jnp.arange(layout.page_size) < lengths[:, None]  # [X, G]
  keys, values = read(pages, ids[:, None], held, layout, q.dtype, None)
  weights, top = weigh(prepare(q, layout.kv_heads, softmax_scale, q.dtype), keys, held[:, None, None])
  seen = Seen(top, weights.sum(-1, keepdims=True), gather_values(weights, values))
  out, lse = (restore(rows, q.shape[1]) for rows in finish(seen))
  return (jnp.moveaxis(out, 1, 2), jnp.moveaxis(lse, 1, 2)) if heads_first else (out, lse)


def merge(out: jax.Array, lse: jax.Array, other: jax.Array, other_lse: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Two parts of one attention, `[..., D]` with the logarithms of their softmaxes' sums `[...]`, as one in float32.

  A part that has seen nothing is zeros and -inf.
  """
  top = jnp.maximum(jnp.maximum(lse, other_lse), NOTHING)  # finite where neither has seen anything
  weight, other_weight = jnp.exp(lse - top), jnp.exp(other_lse - top)
  total = weight + other_weight
  share, other_share = ((part / jnp.where(total == 0, 1, total))[..., None] for part in (weight, other_weight))
  return out.astype(jnp.float32) * share + other.astype(jnp.float32) * other_share, top + jnp.log(total)
