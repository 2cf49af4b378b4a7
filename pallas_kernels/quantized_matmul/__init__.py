"""Products with quantized weights."""

from pallas_kernels.quantized_matmul.api import quantized_matmul
from pallas_kernels.quantized_matmul.storage import QuantizedWeights, dequantize, quantize

__all__ = ['QuantizedWeights', 'dequantize', 'quantize', 'quantized_matmul']
