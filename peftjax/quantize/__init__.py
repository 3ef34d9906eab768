"""Codecs of numbers, shared by weights, optimizers and residuals.

A codec is a module with `encode`, which gives a kind of `Codes`: `affine` (4 or 8 bits, a range for each
group) or `blockwise` (8 bits of the dynamic map, a scale for each block). `decode` takes any of them.
"""

from peftjax.quantize.codes import Codes, decode

__all__ = ["Codes", "decode"]
