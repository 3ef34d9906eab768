"""Codes of 4 or 8 bits by groups: how they lie in bytes, and the kernels that make and read them."""

from peftjax.kernels.packed_residuals.layout import pack, unpack
from peftjax.kernels.packed_residuals.operation import dequantize, quantize

__all__ = ["dequantize", "pack", "quantize", "unpack"]
