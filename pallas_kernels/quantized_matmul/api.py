"""Product of activations with weights in eight or four bits."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.quantized_matmul import pallas_tpu, reference, xla
from pallas_kernels.quantized_matmul.storage import UNIT

IMPLEMENTATIONS: dict[str, dispatch.Plain | dispatch.Tuned] = {
  'pallas_tpu': dispatch.Tuned(
    pallas_tpu.quantized_matmul, pallas_tpu.Config, pallas_tpu.rule, pallas_tpu.refusal, ('tpu',), pallas_tpu.shorten
  ),
  'xla': dispatch.Plain(xla.quantized_matmul),
  'reference': dispatch.Plain(reference.quantized_matmul),
}


def quantized_matmul(
  x: jax.Array,
  weights: jax.Array,
  scales: jax.Array,
  *,
  x_scales: jax.Array | None = None,
  quantize_activations: bool = False,
  out_dtype: jax.typing.DTypeLike | None = None,
  implementation: str | Sequence[str] | None = None,
) -> jax.Array:
  """Multiply activations by weights that `quantize` made smaller.

  Floating activations meet weights alone that are quantized; the sum is in float32. Integer activations (w8a8) meet
  eight-bit weights as integers: `x_scales[m] · Σ scales[n] · (x[m] · weights[:, n])`, a sum in int32 in each group.

  Args:
    x: `[M, K]` activations, floating; or int8, and then `x_scales` belong to them. Other axes are for the caller to
      fold into M.
    weights: int8 `[K, N]`, or int32 `[8·⌈K/64⌉, N]` of four-bit values as `pallas_kernels.quantized_matmul.storage`
      packs them: in whole tiles that a TPU copies at its full rate, from which two masks make bfloat16.
    scales: `[K/group, N]` floating; weight = stored · scale. `[1, N]` is one scale a column.
    x_scales: `[M]` floating; activation = stored · scale. For int8 x only.
    quantize_activations: Round floating x to int8 first, each row by its largest magnitude.
    out_dtype: Of the result; x's, or bfloat16 if that is int8.
    implementation: 'pallas_tpu', 'xla', 'reference', several of them in order of preference, or None for the fastest
      here.

  Returns:
    `[M, N]`.

  Raises:
    ValueError: if shapes or dtypes do not fit together or no implementation that is wanted can run.
  """
  _check(x, weights, scales, x_scales, quantize_activations)
  out_dtype = out_dtype or (jnp.bfloat16 if x.dtype == jnp.int8 else x.dtype)
  if quantize_activations:
    x, x_scales = quantize_rows(x)
  scales = scales.astype(jnp.float32)
  run = dispatch.choose('quantized_matmul', IMPLEMENTATIONS, implementation, pallas_tpu.problem(x, weights, scales))
  wide = out_dtype if out_dtype in (jnp.float32, jnp.bfloat16) else jnp.float32  # as TPUs write
  return run(x, weights, scales, x_scales=x_scales, out_dtype=wide).astype(out_dtype)


def quantize_rows(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Activations `[M, K]` as int8, the largest magnitude of each row being 127, and the scales `[M]` that undo it."""
  x = x.astype(jnp.float32)
  x_scales = jnp.abs(x).max(1) / 127
  return jnp.round(x / jnp.where(x_scales > 0, x_scales, 1)[:, None]).astype(jnp.int8), x_scales


def _check(x, weights, scales, x_scales, quantize_activations) -> None:
  if x.ndim != 2 or weights.ndim != 2 or scales.ndim != 2:
    raise ValueError(
      f'x {x.shape}, weights {weights.shape} and scales {scales.shape} are not [M, K], [K, N] and [K/group, N]; '
      'reshape other axes into M.'
    )
  (size_m, size_k), size_n = x.shape, weights.shape[1]
  if 0 in x.shape or 0 in weights.shape or 0 in scales.shape:
    raise ValueError(f'x {x.shape}, weights {weights.shape} and scales {scales.shape} must not be empty.')
  if weights.dtype == jnp.int32:
    rows, what = -(-size_k // UNIT) * 8, f'8 for every {UNIT} of'
  elif weights.dtype == jnp.int8:
    rows, what = size_k, 'one for each of'
  else:
    raise ValueError(f'weights are {weights.dtype}, expected int8, or int32 of packed four-bit values.')
  if weights.shape[0] != rows:
    raise ValueError(
      f'{weights.dtype} weights have {weights.shape[0]} rows, expected {rows}: {what} the {size_k} of x.'
    )
  if scales.shape[1] != size_n:
    raise ValueError(f'scales have {scales.shape[1]} columns and weights {size_n}.')
  if size_k % scales.shape[0]:
    raise ValueError(f'{scales.shape[0]} groups of scales do not divide K, which is {size_k}.')
  if not jnp.issubdtype(scales.dtype, jnp.floating):
    raise ValueError(f'scales are {scales.dtype}, expected floating.')
  integers = x.dtype == jnp.int8
  if not integers and not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(f'x is {x.dtype}, expected floating or int8.')
  if integers and quantize_activations:
    raise ValueError(f'quantize_activations is for floating x, and x is {x.dtype} already.')
  if integers != (x_scales is not None):
    raise ValueError(f'x is {x.dtype} and x_scales are {"missing" if x_scales is None else "given"}: int8 needs them.')
  if x_scales is not None and x_scales.shape != (size_m,):
    raise ValueError(f'x_scales are {x_scales.shape}, expected {(size_m,)}, one for each row of x.')
  if (integers or quantize_activations) and weights.dtype != jnp.int8:
    raise ValueError(f'int8 activations take int8 weights, not four-bit ones in {weights.dtype}.')
