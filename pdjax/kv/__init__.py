"""The bytes of the KV cache, and moving them."""

from pdjax.kv.pages import KVPages, page_bytes

__all__ = ['KVPages', 'page_bytes']
