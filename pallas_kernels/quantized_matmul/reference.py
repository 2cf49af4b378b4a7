"""Product with quantized weights, in plain jnp: this defines the answer."""

import jax
import jax.numpy as jnp

from pallas_kernels.quantized_matmul.storage import QuantizedWeights, dequantize


def quantized_matmul(
  x: jax.Array,
  weights: jax.Array,
  scales: jax.Array,
  *,
  x_scales: jax.Array | None = None,
  out_dtype: jax.typing.DTypeLike,
) -> jax.Array:
  """See `pallas_kernels.quantized_matmul.quantized_matmul`."""
  if x_scales is None:
    values = dequantize(QuantizedWeights(weights, scales), x.shape[1])
    return jnp.matmul(x.astype(jnp.float32), values, precision='highest').astype(out_dtype)
  groups, (size_m, size_k) = scales.shape[0], x.shape
  products = jnp.einsum(
    'mgk,gkn->gmn',
    x.reshape(size_m, groups, size_k // groups).astype(jnp.int32),
    weights.reshape(groups, size_k // groups, -1).astype(jnp.int32),
  )
  out = jnp.sum(products.astype(jnp.float32) * scales[:, None], axis=0)
  return (out * x_scales[:, None]).astype(out_dtype)
