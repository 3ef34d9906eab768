"""Residuals of a backward pass in 4 or 8 bits: a group code of any array, a grid for derivatives."""

from peftjax.kernels.packed_residuals.codes import GROUP, Code, Grid, check, coarse, decode, encode
from peftjax.kernels.packed_residuals.layout import pack, unpack

__all__ = ["GROUP", "Code", "Grid", "check", "coarse", "decode", "encode", "pack", "unpack"]
