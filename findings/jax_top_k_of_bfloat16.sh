#!/usr/bin/env bash
# On a CPU jax.lax.top_k of bfloat16, float16 or integers takes a hundred times as long as of float32.
#
# Guess: half the bytes take at most as long, and a cast to float32 first is wasted work.
# Instead: XLA has a partial selection for float32 alone; every other type is sorted whole. Casting is the quick way,
#   and changes neither values nor order.
# Versions: jax 0.10.2 on CPU (2 cores), Python 3.11; 2026-11-27.
# Seen:
#   top 20 of [4, 128256]: float32 0.5 ms, bfloat16 130 ms, bfloat16 cast to float32 0.7 ms, int32 128 ms
# For pdjax: logits are float32 before anything is chosen (pdjax/model/sampling.py), and the cuts of top-k and top-p
#   search the bits of a float instead of ranking integers.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
JAX_PLATFORMS=cpu "$folder/venv/bin/python" -I - <<'END'
import time

import jax
import jax.numpy as jnp
import numpy as np

logits = np.random.default_rng(0).normal(size=(4, 128256)).astype(np.float32)


def milliseconds(x, cast=None):
  top = jax.jit(lambda x: jax.lax.top_k(x if cast is None else x.astype(cast), 20))
  jax.block_until_ready(top(x))
  times = []
  for _ in range(5):
    begin = time.perf_counter()
    jax.block_until_ready(top(x))
    times.append(1e3 * (time.perf_counter() - begin))
  return min(times)


floats, halves = milliseconds(jnp.asarray(logits)), milliseconds(jnp.asarray(logits, jnp.bfloat16))
cast = milliseconds(jnp.asarray(logits, jnp.bfloat16), jnp.float32)
integers = milliseconds(jax.lax.bitcast_convert_type(jnp.asarray(logits), jnp.int32))
print(
  f'top 20 of [4, 128256]: float32 {floats:.1f} ms, bfloat16 {halves:.0f} ms, '
  f'bfloat16 cast to float32 {cast:.1f} ms, int32 {integers:.0f} ms'
)
assert halves > 10 * cast and integers > 10 * floats
END
