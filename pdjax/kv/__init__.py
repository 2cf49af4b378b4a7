"""The bytes of the KV cache, and moving them."""

from pdjax.kv.pages import KVPages
from pdjax.kv.pool import Pool

__all__ = ['KVPages', 'Pool']
