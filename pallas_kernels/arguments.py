"""Arguments of the attention kernels: their checks, and the facts by which an implementation is chosen."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.layouts import PageLayout

QUANTIZED = ('int8', 'float8_e4m3fn', 'float8_e5m2')  # page dtypes that need scales


def check_queries_and_pages(
  q: jax.Array, pages: jax.Array, scales: jax.Array | None, shapes: Mapping[int, str]
) -> PageLayout:
  """See that queries can attend to pages `[P, A, C, G, W]` with these scales, and say how the pages are laid out.

  Args:
    q: `[..., H, D]`.
    pages: Keys and values.
    scales: `[P, 2, K, G]` of quantized pages, else None.
    shapes: Shapes that q may have, by the number of axes.

  Raises:
    ValueError: if shapes or dtypes do not fit together.
  """
  if q.ndim not in shapes:
    raise ValueError(f'q {q.shape} is not {" or ".join(shapes.values())}; reshape it.')
  if not q.size or not pages.size:
    raise ValueError(f'q {q.shape} or pages {pages.shape} hold nothing; leave out the call.')
  if not jnp.issubdtype(q.dtype, jnp.floating) or q.dtype.name in QUANTIZED:
    raise ValueError(f'q is {q.dtype}, expected float32, bfloat16 or float16; cast it.')
  layout = PageLayout.of(pages.shape, q.shape[-1])
  if q.shape[-2] % layout.kv_heads:
    raise ValueError(
      f'{layout.kv_heads} key/value heads do not divide {q.shape[-2]} query heads: q {q.shape}, pages {pages.shape} '
      f'({layout.name}); give every key/value head as many query heads.'
    )
  _check_scales(pages, scales, (pages.shape[0], 2, layout.kv_heads, layout.page_size))
  return layout


def _check_scales(pages: jax.Array, scales: jax.Array | None, shape: tuple[int, ...]) -> None:
  if pages.dtype.name not in QUANTIZED:
    if not jnp.issubdtype(pages.dtype, jnp.floating):
      raise ValueError(f'pages are {pages.dtype}, expected float32, bfloat16, float16, or {", ".join(QUANTIZED)}.')
    if scales is not None:
      raise ValueError(f'pages are {pages.dtype} and scales {scales.shape} are given; only int8 or fp8 pages have any.')
    return
  if scales is None:
    raise ValueError(f'pages are {pages.dtype} and scales are None; give float32 scales [P, 2, K, G] = {shape}.')
  if scales.shape != shape or scales.dtype != jnp.float32:
    raise ValueError(
      f'scales are {scales.dtype} {scales.shape}, expected float32 [P, 2, K, G] = {shape} for pages {pages.shape}: '
      'one for each token and key/value head, whatever the layout of the pages.'
    )


def check_options(
  sliding_window: int | None, soft_cap: float | None, sinks: jax.Array | None, query_heads: int
) -> None:
  """See that a window shows each token at least itself, a soft cap bounds scores, and each query head has a sink.

  Raises:
    ValueError: if not.
  """
  if sliding_window is not None and sliding_window < 1:
    raise ValueError(f'sliding_window is {sliding_window}, expected at least 1 token, or None to see all.')
  if soft_cap is not None and not 0 < soft_cap < float('inf'):
    raise ValueError(f'soft_cap is {soft_cap}, expected a bound above 0, or None for scores without one.')
  if sinks is None:
    return
  if sinks.shape != (query_heads,):
    raise ValueError(f'sinks {sinks.shape} are not [H] = ({query_heads},), one for each query head of q.')
  if not jnp.issubdtype(sinks.dtype, jnp.floating):
    raise ValueError(f'sinks are {sinks.dtype}, expected float32; cast them.')


def check_sequences(sequences: int, **arrays: jax.Array) -> None:
  """See that tables `[B, N]`, lengths `[B]` and offsets `[B + 1]` are whole numbers for B sequences.

  Raises:
    ValueError: if not.
  """
  shapes: dict[str, tuple] = {'lengths': (sequences,), 'offsets': (sequences + 1,)}
  for name, array in arrays.items():
    shape = shapes.get(name, (sequences, array.shape[1] if array.ndim == 2 else 'N'))
    if array.shape != shape:
      expected = str(shape).replace("'", '')
      raise ValueError(f'{name} {array.shape} do not belong to {sequences} sequences: expected {expected}.')
    if not array.size:
      raise ValueError(f'{name} {array.shape} hold nothing; give at least one sequence and a page to each.')
    if not jnp.issubdtype(array.dtype, jnp.integer):
      raise ValueError(f'{name} are {array.dtype}, expected int32; cast them.')


def check_values(
  tables: jax.Array,
  lengths: jax.Array,
  queries: jax.Array | int,
  *,
  num_pages: int,
  page_size: int,
  sliding_window: int | None,
) -> None:
  """Look at lengths and tables on the host.

  Args:
    tables: `[B, N]`.
    lengths: `[B]`.
    queries: `[B]` or one for all, the last tokens of each sequence that are queries.
    num_pages: P.
    page_size: G.
    sliding_window: Tokens that a query sees, or None for all: tables need not name pages before.

  Raises:
    ValueError: if a length is negative or more than a table holds, if a table names a page that there is not where its
      sequence has tokens, or if JAX traces, so that no values are known.
  """
  ids, stops = _values('tables', tables), _values('lengths', lengths)
  room = ids.shape[1] * page_size
  for sequence in np.flatnonzero((stops < 0) | (stops > room)):
    raise ValueError(
      f'lengths[{sequence}] is {stops[sequence]}, expected 0 to {room}: a table has {ids.shape[1]} pages of '
      f'{page_size} tokens; make tables wider or the sequence shorter.'
    )
  counts = np.broadcast_to(_values('queries', queries), stops.shape)
  first_seen = np.zeros_like(stops) if sliding_window is None else stops - counts + 1 - sliding_window
  token = np.arange(ids.shape[1]) * page_size
  used = (token < stops[:, None]) & (token + page_size > first_seen[:, None]) & (counts[:, None] > 0)
  for sequence, slot in np.argwhere(used & ((ids < 0) | (ids >= num_pages))):
    raise ValueError(
      f'tables[{sequence}, {slot}] is {ids[sequence, slot]}, expected 0 to {num_pages - 1}: there are {num_pages} '
      f'pages, and sequence {sequence} has {stops[sequence]} tokens, {page_size} to a page.'
    )


def check_offsets(offsets: jax.Array, lengths: jax.Array, rows: int) -> None:
  """Look at the offsets `[B + 1]` of chunks on the host.

  Raises:
    ValueError: if they do not begin at 0, descend, or go past the rows of q, if a chunk is longer than its sequence, or
      if JAX traces, so that no values are known.
  """
  ends, stops = _values('offsets', offsets), _values('lengths', lengths)
  if ends[0] != 0:
    raise ValueError(f'offsets[0] is {ends[0]}, expected 0: the first chunk begins at the first row of q.')
  chunks = np.diff(ends)
  for sequence in np.flatnonzero(chunks < 0):
    raise ValueError(
      f'offsets[{sequence + 1}] is {ends[sequence + 1]}, expected offsets[{sequence}] = {ends[sequence]} or more: '
      'chunks are packed one after another.'
    )
  if ends[-1] > rows:
    raise ValueError(f'offsets[{len(chunks)}] is {ends[-1]}, expected at most {rows}, the rows of q.')
  for sequence in np.flatnonzero((chunks > stops) & (stops >= 0)):
    raise ValueError(
      f'lengths[{sequence}] is {stops[sequence]}, expected {chunks[sequence]} or more: it counts the chunk in rows '
      f'{ends[sequence]} to {ends[sequence + 1]} of q too.'
    )


def _values(name: str, array: jax.Array | int) -> np.ndarray:
  if isinstance(array, jax.core.Tracer):
    raise ValueError(
      f'checked=True looks at the values in {name}, which are not known while JAX traces: call it outside of jit, or '
      'look at the values before and leave checked=False.'
    )
  return np.asarray(array).astype(np.int64)


def named(**options: Any) -> str:
  """The names of options that are given, which is all that a choice asks of them."""
  return ' '.join(name for name, value in options.items() if value is not None)


def describe(layout: PageLayout, q: Any, pages: Any, tables: Any, options: str = '') -> dict[str, int | str]:
  """Facts by which an implementation and its parameters are chosen; of arrays, or of shapes and dtypes alone."""
  return {
    'dtype': pages.dtype.name,
    'q_dtype': q.dtype.name,
    'layout': layout.name,
    'query_heads': q.shape[-2],
    'kv_heads': layout.kv_heads,
    'head_dim': layout.head_dim,
    'page_size': layout.page_size,
    'batch': tables.shape[0],
    'context': tables.shape[1] * layout.page_size,
    'options': options or 'none',
  }
