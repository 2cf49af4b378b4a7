"""Whether cuDNN can be relied on here: what it is known to refuse, and what comes of trying it.

cuDNN is not ours, and its versions differ. So a GPU is tried before it is relied on: once for each kind of problem,
small ones are attended to and compared with plain products. What fails is not taken, and the reason is said.
"""

import functools
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import cudnn
from pallas_kernels.devices import Device
from pallas_kernels.layouts import PLAIN
from pallas_kernels.tuning import Facts

_FIRST_GPU, _FIRST_GPU_OF_WIDE_HEADS = (8, 0), (9, 0)  # compute capabilities
_LIMITS = {'bfloat16': 2e-2, 'float16': 4e-3}  # of a trial's relative error


def refusal(device: Device, facts: Facts) -> str | None:
  """Why cuDNN does not attend to such pages on a device, or None."""
  dtype, head_dim = str(facts['dtype']), int(facts['head_dim'])
  capability = None if device.gpu is None else device.gpu.compute_capability
  if capability is None:
    return f'it is for GPUs of NVIDIA whose compute capability is known, and this is {device.name}.'
  if capability < _FIRST_GPU:
    return f'cuDNN attends on GPUs of compute capability 8.0 and up, and {device.name} has {_version(capability)}.'
  if dtype not in cudnn.TYPES:
    return f'cuDNN attends in bfloat16 or float16, and pages are {dtype}.'
  if facts['q_dtype'] != dtype:
    return f'q is {facts["q_dtype"]}, and pages are {dtype}.'
  if facts['layout'] != PLAIN:
    return f'it reads plain pages, and these are {facts["layout"]}.'
  if (options := facts.get('options', 'none')) != 'none':
    return f"XLA's call of cuDNN has no {str(options).replace(' ', ', no ')}."
  widest = 256 if capability >= _FIRST_GPU_OF_WIDE_HEADS else 128
  if head_dim % 8 or head_dim > widest:
    return f'heads of {head_dim} are no multiple of 8 up to {widest}.'
  return _tried(device, facts)[0]


def apart(device: Device, facts: Facts) -> bool:
  """Whether a page that is not full must be kept from cuDNN; where no such GPU can be tried, it is."""
  return refusal(device, facts) is not None or _tried(device, facts)[1]


def _version(parts: tuple[int, int]) -> str:
  return '.'.join(map(str, parts))


def _tried(device: Device, facts: Facts) -> tuple[str | None, bool]:
  """What came of a trial of this kind of problem: why not, or None; and whether NaN where no token is shows."""
  if not _is_here(device):
    return None, True
  sizes = (int(facts[name]) for name in ('query_heads', 'kv_heads', 'head_dim', 'page_size'))
  with _TRIAL:
    return _try(str(facts['dtype']), *sizes)


def _is_here(device: Device) -> bool:
  """Whether programs for a device can run in this process."""
  return device.platform == jax.default_backend() == 'gpu'


_TRIAL = threading.Lock()


@functools.cache
def _try(dtype: str, query_heads: int, kv_heads: int, head_dim: int, page_size: int) -> tuple[str | None, bool]:
  with ThreadPoolExecutor(1) as pool:  # whoever asks may be tracing, and another thread is not
    return pool.submit(trial, dtype, query_heads, kv_heads, head_dim, page_size).result()


def trial(dtype: str, query_heads: int, kv_heads: int, head_dim: int, page_size: int) -> tuple[str | None, bool]:
  """Attend to small problems of this kind on the current device, and compare.

  Returns:
    Why cuDNN cannot be relied on for it, or None; and whether it must not see pages that are not full.
  """
  reason, unsafe = None, False
  for keep_apart in (False, True):
    for poisoned in (False, True):
      try:
        with jax.debug_nans(False):
          error = _error(_problem(dtype, query_heads, kv_heads, head_dim, page_size, poisoned), keep_apart)
      except Exception as raised:  # whatever XLA or cuDNN raise: there is another way
        return f'cuDNN was tried, and {type(raised).__name__} was raised: {str(raised)[:300]}', True
      if not error <= _LIMITS[dtype]:
        reason = f'cuDNN was tried, and its result differs from plain products by {error:.1e} of them.'
        break
    else:
      return None, unsafe
    unsafe = True
  return reason, unsafe


def _problem(dtype: str, query_heads: int, kv_heads: int, head_dim: int, page_size: int, poisoned: bool) -> Any:
  """Queries, pages and tables of three sequences, and their tokens."""
  rng = np.random.default_rng(0)
  lengths = np.array([max(2 * page_size, 256) + 1, 1, page_size], np.int32)
  counts = -(-lengths // page_size)
  pages = rng.standard_normal((counts.sum() + 3, 2, kv_heads, page_size, head_dim)).astype(np.float32)
  ids = rng.permutation(len(pages))
  tables = np.full((3, counts[0] + 1), ids[-1])  # behind a sequence stands a page of nobody
  held = np.zeros((len(pages), page_size), bool)
  for row, (count, length) in enumerate(zip(counts, lengths, strict=True)):
    tables[row, :count], ids = ids[:count], ids[count:]
    held[tables[row, :count]] = np.arange(count * page_size).reshape(count, page_size) < length
  if poisoned:
    pages = np.where(held[:, None, None, :, None], pages, np.nan)
  q = rng.standard_normal((3, 5, query_heads, head_dim)).astype(np.float32)
  return jnp.asarray(q, dtype), jnp.asarray(pages, dtype), jnp.asarray(tables, jnp.int32), jnp.asarray(lengths)


@functools.partial(jax.jit, static_argnames='apart')
def _ask(q: jax.Array, pages: jax.Array, tables: jax.Array, lengths: jax.Array, apart: bool) -> Any:
  """What cuDNN gives when it is called in each way that there is, with the keys of the last."""
  count, rows, query_heads, head_dim = q.shape
  kv_heads, scale = pages.shape[2], head_dim**-0.5
  all_rows, group = jnp.full(count, rows, jnp.int32), query_heads // kv_heads
  by_token = cudnn.attend_pages(q, pages, tables, all_rows, lengths, softmax_scale=scale, apart=apart)
  grouped, all_heads = q[:, 0].reshape(count, kv_heads, group, head_dim), jnp.full(count, group, jnp.int32)
  by_head = cudnn.attend_pages(
    grouped, pages, tables, all_heads, lengths, softmax_scale=scale, heads_first=True, apart=apart
  )
  own = q[:, :, ::group]
  chunk = cudnn.attend(q, own, own, all_rows, all_rows, softmax_scale=scale, causal=True, return_lse=True)
  return by_token, by_head, chunk, own


def _error(problem: Any, keep_apart: bool) -> float:
  """How far cuDNN is from plain products at most, as a share of these; NaN if it is."""
  q, pages, tables, lengths = problem
  count, scale = len(q), q.shape[-1] ** -0.5
  by_token, by_head, chunk, own = jax.tree.map(
    lambda array: np.asarray(array, np.float64), _ask(q, pages, tables, lengths, keep_apart)
  )
  queries, cached = np.asarray(q, np.float64), np.asarray(pages, np.float64)
  expected = [_products(queries[i], *_tokens(cached, tables[i], int(lengths[i])), scale) for i in range(count)]
  out, lse = (np.stack(part) for part in zip(*expected, strict=True))
  expected = [_products(queries[i], own[i], own[i], scale, causal=True) for i in range(count)]
  chunk_out, chunk_lse = (np.stack(part) for part in zip(*expected, strict=True))
  pairs = [
    (by_token[0], out),
    (by_token[1], lse),
    (by_head[0].reshape(out[:, 0].shape), out[:, 0]),
    (by_head[1].reshape(lse[:, 0].shape), lse[:, 0]),
    (chunk[0], chunk_out),
    (np.moveaxis(chunk[1], 1, 2), chunk_lse),
  ]
  return float(np.max([np.linalg.norm(found - sought) / np.linalg.norm(sought) for found, sought in pairs]))


def _tokens(pages: np.ndarray, table: Any, length: int) -> tuple[np.ndarray, np.ndarray]:
  """Keys and values `[S, K, D]` of a sequence."""
  keys, values = np.moveaxis(pages[np.asarray(table)], (1, 3), (0, 2)).reshape(2, -1, pages.shape[2], pages.shape[4])
  return keys[:length], values[:length]


def _products(
  q: np.ndarray, keys: np.ndarray, values: np.ndarray, scale: float, causal: bool = False
) -> tuple[np.ndarray, np.ndarray]:
  """Attention `[R, H, D]` of all rows to all keys, or of row i up to key i, and the logarithms of its sums `[R, H]`."""
  group = q.shape[1] // keys.shape[1]
  keys, values = (np.repeat(tokens, group, axis=1) for tokens in (keys, values))
  scores = np.einsum('rhd,shd->rhs', q, keys) * scale
  hidden = causal & (np.arange(len(keys)) > np.arange(len(q))[:, None])
  scores = np.where(hidden[:, None], -np.inf, scores)
  lse = np.log(np.exp(scores).sum(-1))
  return np.einsum('rhs,shd->rhd', np.exp(scores - lse[..., None]), values), lse
