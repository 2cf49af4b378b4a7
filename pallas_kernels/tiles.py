"""Tiles, the page of a problem, and pages that no TPU attends to: shared by the TPU forms of the kernels."""

import math
from collections.abc import Sequence

import jax.numpy as jnp

from pallas_kernels.devices import LANES
from pallas_kernels.layouts import PageLayout
from pallas_kernels.tuning import Facts

SUBLANES = 8


def round_up(value: int, multiple: int) -> int:
  """The next multiple."""
  return -(-value // multiple) * multiple


def sublanes(dtype: jnp.dtype) -> int:
  """Rows of a tile: smaller elements are packed into the same register."""
  return SUBLANES * 4 // jnp.dtype(dtype).itemsize


def padded_bytes(shape: Sequence[int], dtype: jnp.dtype) -> int:
  """Bytes of an array in vector memory, where its last two axes fill whole tiles."""
  *leading, rows, lanes = shape
  return math.prod(leading) * round_up(rows, sublanes(dtype)) * round_up(lanes, LANES) * jnp.dtype(dtype).itemsize


def page_of(facts: Facts) -> tuple[int, int, int, int]:
  """The shape `[A, C, G, W]` of a problem's pages."""
  sizes = (int(facts[name]) for name in ('kv_heads', 'page_size', 'head_dim'))
  return PageLayout(str(facts['layout']), *sizes).page_shape


def compute_dtype(q_dtype: jnp.dtype, page_dtype: jnp.dtype) -> jnp.dtype:
  """The dtype of products with queries: that of pages; of quantized ones that of queries, float16 as float32."""
  if page_dtype.itemsize > 1:
    return page_dtype
  return jnp.dtype(jnp.bfloat16) if q_dtype == jnp.bfloat16 else jnp.dtype(jnp.float32)


def page_refusal(facts: Facts) -> str | None:
  """A reason against attending to such pages on any TPU, or None."""
  dtype, page_size, width = jnp.dtype(str(facts['dtype'])), int(facts['page_size']), page_of(facts)[3]
  if width % LANES:
    return f'pages end in an axis of {width}, and a TPU reads multiples of {LANES}; pack heads of 64 two by two.'
  if dtype not in (jnp.float32, jnp.bfloat16, jnp.int8, jnp.float8_e4m3fn):
    return f'pages are {dtype}, and it reads float32, bfloat16, int8 and float8_e4m3fn.'
  if page_size % sublanes(dtype):
    return f'pages of {page_size} tokens of {dtype} do not fill tiles; take a multiple of {sublanes(dtype)}.'
  if dtype.itemsize == 1 and page_size % LANES:
    return f'scales of pages of {page_size} tokens do not fill lanes; take quantized pages of {LANES} tokens.'
  return None
