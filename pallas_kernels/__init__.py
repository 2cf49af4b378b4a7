"""Attention kernels over paged keys and values: arrays in, arrays out."""

from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.prefill_attention import prefill_attention

__all__ = ['paged_attention', 'prefill_attention']
