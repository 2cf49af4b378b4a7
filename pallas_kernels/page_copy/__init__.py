"""Pages of the KV cache copied out and put back."""

from pallas_kernels.page_copy.api import gather_pages, scatter_pages

__all__ = ['gather_pages', 'scatter_pages']
