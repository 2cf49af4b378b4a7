"""Pages of the KV cache filled with new tokens."""

from pallas_kernels.token_append.api import append_tokens

__all__ = ['append_tokens']
