"""Kernels of LLM inference over paged keys and values: arrays in, arrays out."""

from pallas_kernels.layouts import PageLayout
from pallas_kernels.page_copy import gather_pages, scatter_pages
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.prefill_attention import prefill_attention
from pallas_kernels.quantized_matmul import quantized_matmul
from pallas_kernels.token_append import append_tokens

__all__ = [
  'PageLayout', 'append_tokens', 'gather_pages', 'paged_attention', 'prefill_attention', 'quantized_matmul',
  'scatter_pages',
]  # fmt: skip
