"""Pages of the KV cache copied out, put back, and filled with new tokens."""

from pallas_kernels.page_copy.api import append_tokens, gather_pages, scatter_pages

__all__ = ['append_tokens', 'gather_pages', 'scatter_pages']
