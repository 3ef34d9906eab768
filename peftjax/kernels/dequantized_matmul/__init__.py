"""A product with a weight held as codes of 4 or 8 bits, forward and transposed: no dense weight is stored.

The codes are those of Dettmers et al. 2023, arXiv 2305.14314 (NF4), of int4 and int8, and of any table of 16.
"""

from peftjax.kernels.dequantized_matmul.operation import dequantized_matmul

__all__ = ["dequantized_matmul"]
