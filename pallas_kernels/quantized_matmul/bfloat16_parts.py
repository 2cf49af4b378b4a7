"""Float32 values as bfloat16 parts that add up to them, for matrix units that multiply no float32."""

import jax
import jax.numpy as jnp

# Of a product of two values in three parts each: those that count.
TERMS = ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0))


def split(x, pieces: int):
  """Float32 values as so many bfloat16 parts that add up to them; bfloat16 and int8 as they are."""
  if x.dtype != jnp.float32:
    return [x]
  parts = []
  for _ in range(pieces):
    parts.append(top(x).astype(jnp.bfloat16))
    x = x - top(x)
  return parts


def top(x):
  """Float32 values less what bfloat16 has no bits for. Not a conversion and back: compilers leave that out."""
  bits = jax.lax.bitcast_convert_type(x, jnp.int32) & -65536
  return jax.lax.bitcast_convert_type(bits, jnp.float32)
