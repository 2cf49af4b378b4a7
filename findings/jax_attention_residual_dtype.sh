#!/usr/bin/env bash
# jax.nn.dot_product_attention gives the logarithm of the softmax's sum in the dtype of q, too coarse to merge with.
#
# Guess: `return_residual=True` gives the logsumexp as attention kernels keep it, in float32, so that attention over two
#   parts of the keys can be merged into attention over all of them.
# Instead: it is rounded to the dtype of the queries. In bfloat16 a logsumexp of 8 is known to 0.03, so the two parts
#   are weighed wrongly by some percent: merging costs more than everything else that bfloat16 rounds.
# Versions: jax 0.10.2, jaxlib 0.10.2, numpy 2.4.6 on CPU, Python 3.11; 2026-11-28.
# Seen:
#   the residual of bfloat16 queries is bfloat16
#   error of all keys at once 0.0024, of two parts merged 0.0071, merged by sums in float32 0.0024
# For pdjax: a chunk of a prompt behind cached tokens is two calls of cuDNN, merged. `pallas_kernels/cudnn.py` makes the
#   call itself, which leaves the sums in float32; `tests/pallas_kernels/test_cudnn.py` compares the merge.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
JAX_PLATFORMS=cpu "$folder/venv/bin/python" -I - <<'END'
import jax
import jax.numpy as jnp
import numpy as np

rng = np.random.default_rng(0)
q, k, v = (jnp.asarray(rng.standard_normal((1, count, 4, 64)), jnp.bfloat16) for count in (64, 2048, 2048))


def attend(first, last):
  out, lse = jax.nn.dot_product_attention(q, k[:, first:last], v[:, first:last], return_residual=True)
  return out, lse


def exact(first, last):
  wide_q, wide_k, wide_v = (np.asarray(array, np.float64) for array in (q, k[:, first:last], v[:, first:last]))
  scores = np.einsum('bthd,bshd->bths', wide_q, wide_k) / 8
  lse = np.log(np.exp(scores).sum(-1))
  return np.einsum('bths,bshd->bthd', np.exp(scores - lse[..., None]), wide_v), lse


def merge(one, other):
  (out, lse), (other_out, other_lse) = ([np.asarray(array, np.float64) for array in part] for part in (one, other))
  share = 1 / (1 + np.exp(other_lse - lse))[..., None]
  return out * share + other_out * (1 - share)


def error(out):
  sought = exact(0, 2048)[0]
  return np.linalg.norm(np.asarray(out, np.float64) - sought) / np.linalg.norm(sought)


parts = (0, 1024), (1024, 2048)
dtype = attend(0, 2048)[1].dtype.name
whole, merged = error(attend(0, 2048)[0]), error(merge(*(attend(*part) for part in parts)))
wide = error(merge(*((attend(*part)[0], exact(*part)[1]) for part in parts)))
print(f'the residual of bfloat16 queries is {dtype}')
print(f'error of all keys at once {whole:.4f}, of two parts merged {merged:.4f}, merged by sums in float32 {wide:.4f}')
assert dtype == 'bfloat16'
assert merged > 2 * whole and wide < 1.2 * whole, 'the rounding of the sums has gone'
END
