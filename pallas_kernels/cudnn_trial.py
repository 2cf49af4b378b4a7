"""Whether cuDNN can be relied on here: what it is known to refuse, and what comes of trying it.

cuDNN is not ours, and its versions differ. So a GPU is tried before it is relied on: once for each kind of problem,
small ones are attended to and compared with plain products. What fails is not taken, and the reason is said.
"""

import dataclasses
import functools
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import cudnn, devices
from pallas_kernels.devices import Device
from pallas_kernels.layouts import PLAIN
from pallas_kernels.tuning import Facts

_FIRST_GPU, _FIRST_GPU_OF_WIDE_HEADS = (8, 0), (9, 0)  # compute capabilities
_LIMITS = {'bfloat16': 2e-2, 'float16': 4e-3}  # of a trial's relative error


@dataclasses.dataclass(frozen=True)
class Kind:
  """A kind of problem, tried once: `rows` of queries, as in prefill, or heads that share keys as rows, as in decode."""

  rows: bool
  dtype: str
  query_heads: int
  kv_heads: int
  head_dim: int
  page_size: int

  @classmethod
  def of(cls, rows: bool, facts: Facts) -> 'Kind':
    """Of a problem."""
    sizes = (int(facts[name]) for name in ('query_heads', 'kv_heads', 'head_dim', 'page_size'))
    return cls(rows, str(facts['dtype']), *sizes)


@dataclasses.dataclass(frozen=True)
class Finding:
  """The outcome of a trial: a reason against cuDNN, or None; whether NaN where no token is shows in its results.

  If it shows, cuDNN must not see pages that are not full.
  """

  reason: str | None
  shows_nan: bool


def refusal(device: Device, facts: Facts, *, rows: bool, apart: bool) -> str | None:
  """A reason against attending to such pages with cuDNN on a device, or None.

  Args:
    device: The device.
    facts: The problem.
    rows: Whether rows of queries are, as in prefill.
    apart: Whether pages that are not full are kept from it.
  """
  dtype, head_dim = str(facts['dtype']), int(facts['head_dim'])
  capability = None if device.gpu is None else device.gpu.compute_capability
  if capability is None:
    return f'it is for GPUs of NVIDIA whose compute capability is known, and this is {device.name}.'
  if capability < _FIRST_GPU:
    return f'cuDNN attends on GPUs of compute capability 8.0 and up, and {device.name} has {_version(capability)}.'
  if dtype not in cudnn.TYPES:
    return f'cuDNN attends in bfloat16 or float16, and pages are {dtype}; take one of these, or xla.'
  if facts['q_dtype'] != dtype:
    return f'q is {facts["q_dtype"]}, and pages are {dtype}.'
  if facts['layout'] != PLAIN:
    return f'it reads plain pages, and these are {facts["layout"]}.'
  if (options := facts.get('options', 'none')) != 'none':
    return f'it asks cuDNN for no {str(options).replace(" ", " and no ")}, which this has; take xla.'
  widest = 256 if capability >= _FIRST_GPU_OF_WIDE_HEADS else 128
  if head_dim % 8 or head_dim > widest:
    return f'heads of {head_dim} are no multiple of 8 up to {widest}.'
  found = _tried(device, Kind.of(rows, facts))
  if found.reason is None and found.shows_nan and not apart:
    return 'NaN where no token is shows in its results; take apart=True.'
  return found.reason


def apart(device: Device, facts: Facts, *, rows: bool) -> bool:
  """Whether a page that is not full must be kept from cuDNN; where no such GPU can be tried, it is."""
  if refusal(device, facts, rows=rows, apart=True) is not None:
    return True
  return _tried(device, Kind.of(rows, facts)).shows_nan


def _version(parts: tuple[int, int]) -> str:
  return '.'.join(map(str, parts))


_UNTRIED = Finding(None, True)
_findings: dict[tuple[str, Kind], Finding] = {}
_trying = threading.Lock()


def _tried(device: Device, kind: Kind) -> Finding:
  """The finding of a trial on a device of this process; where there is none, nothing speaks against cuDNN."""
  here = _local(device)
  if here is None:
    return _UNTRIED
  with _trying:
    key = device.name, kind
    if key not in _findings:
      with ThreadPoolExecutor(1) as pool:  # whoever asks may be tracing, and another thread is not
        finding = pool.submit(trial, kind, here).result()
      if finding.reason is not None and 'RESOURCE_EXHAUSTED' in finding.reason:
        return finding  # next time there may be room
      _findings[key] = finding
    return _findings[key]


def _local(device: Device) -> Any:
  """A GPU of this process that is such a device, or None."""
  if device.platform != 'gpu' or jax.default_backend() != 'gpu':
    return None
  return next((one for one in jax.local_devices() if devices.of(one).name == device.name), None)


def trial(kind: Kind, device: Any = None) -> Finding:
  """Attend to small problems of a kind on a `jax.Device`, the default one if None, and compare."""
  reason, shows_nan = None, False
  for keep_apart in (False, True):
    for poisoned in (False, True):
      try:
        with jax.debug_nans(False), jax.default_device(device):
          error = _error(kind, poisoned, keep_apart)
      except Exception as raised:  # whatever XLA or cuDNN raise: there is another way
        return Finding(f'cuDNN was tried, and {type(raised).__name__} was raised: {str(raised)[:300]}', True)
      if not error <= _LIMITS[kind.dtype]:
        reason = f'cuDNN was tried, and its result differs from plain products by {error:.1e} of them.'
        break
    else:
      return Finding(None, shows_nan)
    shows_nan = True
  return Finding(reason, shows_nan)


# ---------------------------------------------------------------------------- what is asked, and what it should be

_COUNTS = (130, 7, 64)  # rows that count, of a tile as long as the first


def _error(kind: Kind, poisoned: bool, keep_apart: bool) -> float:
  """The largest error of cuDNN beside plain products, as a share of these; NaN if a result is."""
  rng = np.random.default_rng(0)
  lengths = np.array([max(2 * kind.page_size, 256) + 1, 1, kind.page_size], np.int32)
  pages, tables = _scattered(rng, kind, lengths, poisoned)
  counts = np.array(_COUNTS if kind.rows else (1, 1, 1), np.int32)

  def drawn(heads: int) -> jax.Array:
    return jnp.asarray(rng.standard_normal((3, counts[0], heads, kind.head_dim)), kind.dtype)

  q, own = drawn(kind.query_heads), (drawn(kind.kv_heads), drawn(kind.kv_heads))
  ask = _ask_rows if kind.rows else _ask_heads
  found = ask(q, own, pages, jnp.asarray(tables), jnp.asarray(counts), jnp.asarray(lengths), keep_apart)
  errors = []
  for number, count in enumerate(counts):
    rows = _wide(q)[number, :count]
    cached = _tokens(_wide(pages), tables[number], int(lengths[number]))
    keys, values = (_wide(part)[number, :count] for part in own)
    expected = (_products(rows, *cached), _products(rows, keys, values, causal=True))
    for results, sought in zip(found, expected, strict=False):  # of heads, the pages alone
      errors += [_difference(_wide(one)[number, :count], other) for one, other in zip(results, sought, strict=True)]
  return float(np.max(errors))


@functools.partial(jax.jit, static_argnames='apart')
def _ask_rows(
  q: jax.Array, own: Any, pages: jax.Array, tables: jax.Array, counts: jax.Array, lengths: jax.Array, apart: bool
) -> Any:
  """As prefill: over pages, and causally over a chunk's own keys; `[X, R, H, D]` and `[X, R, H]` each."""
  scale, (keys, values) = q.shape[-1] ** -0.5, own
  before = cudnn.attend_pages(q, pages, tables, counts, lengths, softmax_scale=scale, apart=apart)
  out, lse = cudnn.attend(q, keys, values, counts, counts, softmax_scale=scale, causal=True, return_lse=True)
  assert lse is not None
  return before, (out, jnp.moveaxis(lse, 1, 2))


@functools.partial(jax.jit, static_argnames='apart')
def _ask_heads(
  q: jax.Array, own: Any, pages: jax.Array, tables: jax.Array, counts: jax.Array, lengths: jax.Array, apart: bool
) -> Any:
  """As decode: one row of each sequence, whose heads are the rows of a problem."""
  del own
  group = q.shape[2] // pages.shape[2]
  grouped = q.reshape(len(q), pages.shape[2], group, q.shape[3])
  out, lse = cudnn.attend_pages(
    grouped, pages, tables, group * counts, lengths, softmax_scale=q.shape[-1] ** -0.5, heads_first=True, apart=apart
  )
  return ((out.reshape(q.shape), lse.reshape(q.shape[:-1])),)


def _scattered(
  rng: np.random.Generator, kind: Kind, lengths: np.ndarray, poisoned: bool
) -> tuple[jax.Array, np.ndarray]:
  """Pages of sequences in any order, and their tables, which go on with a page of nobody; NaN where no token is."""
  counts = -(-lengths // kind.page_size)
  shape = counts.sum() + 3, 2, kind.kv_heads, kind.page_size, kind.head_dim
  pages, ids = rng.standard_normal(shape).astype(np.float32), rng.permutation(shape[0])
  tables = np.full((len(lengths), counts.max() + 1), ids[-1], np.int32)
  held = np.zeros((shape[0], kind.page_size), bool)
  for row, (count, length) in enumerate(zip(counts, lengths, strict=True)):
    tables[row, :count], ids = ids[:count], ids[count:]
    held[tables[row, :count]] = np.arange(count * kind.page_size).reshape(count, -1) < length
  if poisoned:
    pages = np.where(held[:, None, None, :, None], pages, np.nan)
  return jnp.asarray(pages, kind.dtype), tables


def _tokens(pages: np.ndarray, table: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
  """Keys and values `[S, K, D]` of a sequence."""
  keys, values = np.moveaxis(pages[table], (1, 3), (0, 2)).reshape(2, -1, pages.shape[2], pages.shape[4])
  return keys[:length], values[:length]


def _products(
  q: np.ndarray, keys: np.ndarray, values: np.ndarray, causal: bool = False
) -> tuple[np.ndarray, np.ndarray]:
  """Attention `[R, H, D]` of all rows to all keys, or of row i up to key i, and the logarithms of its sums `[R, H]`."""
  group = q.shape[1] // keys.shape[1]
  keys, values = (np.repeat(tokens, group, axis=1) for tokens in (keys, values))
  scores = np.einsum('rhd,shd->rhs', q, keys) * q.shape[-1] ** -0.5
  hidden = causal & (np.arange(len(keys)) > np.arange(len(q))[:, None])
  scores = np.where(hidden[:, None], -np.inf, scores)
  lse = np.log(np.exp(scores).sum(-1))
  return np.einsum('rhs,shd->rhd', np.exp(scores - lse[..., None]), values), lse


def _wide(array: jax.Array) -> np.ndarray:
  return np.asarray(array, np.float64)


def _difference(found: np.ndarray, sought: np.ndarray) -> float:
  return float(np.linalg.norm(found - sought) / np.linalg.norm(sought))
