#!/usr/bin/env bash
# jax.lax.top_k ranks 0.0 before -0.0; argmax and argsort take them for equal.
#
# Guess: the first index of top_k is argmax, and equal values keep their order, as with a stable descending argsort.
# Instead: top_k orders floats by their bits. Of -0.0 and 0.0 the second is the higher, and a NaN whose sign bit is set
#   is the lowest of all, where argmax takes a NaN of either sign for the highest. A logit of -0.0 is nothing rare: a
#   product with a penalty or a mask makes one.
# Versions: jax 0.10.2 on CPU, Python 3.11; 2026-11-27.
# Seen:
#   [-0.0, 0.0, -1.0]: top_k [1, 0, 2], argmax 0, stable argsort [0, 1, 2]
#   [1.0, -nan, 2.0]: top_k [2, 0, 1], argmax 1
# For pdjax: the likeliest tokens that a request is told began with another one than the greedy token. `tell` and
#   `keep_likely` in pdjax/model/sampling.py give zeros and NaN one form each before they compare bits.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
JAX_PLATFORMS=cpu "$folder/venv/bin/python" -I - <<'END'
import jax
import jax.numpy as jnp
import numpy as np

zeros = jnp.array([-0.0, 0.0, -1.0])
top, first = jax.lax.top_k(zeros, 3)[1].tolist(), int(jnp.argmax(zeros))
order = jnp.argsort(zeros, descending=True).tolist()
print(f'{zeros.tolist()}: top_k {top}, argmax {first}, stable argsort {order}')
assert (top, first, order) == ([1, 0, 2], 0, [0, 1, 2])

nans = jnp.array(np.array([1.0, np.copysign(np.nan, -1), 2.0], np.float32))
top, first = jax.lax.top_k(nans, 3)[1].tolist(), int(jnp.argmax(nans))
print(f'[1.0, -nan, 2.0]: top_k {top}, argmax {first}')
assert (top, first) == ([2, 0, 1], 1)
END
