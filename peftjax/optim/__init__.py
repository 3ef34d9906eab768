"""Optimizers and rewrites of optimizers, as optax gradient transformations."""

from peftjax.optim.bases import captured_energy, gram_basis, subspace_iteration, svd_basis
from peftjax.optim.blockwise import Codes
from peftjax.optim.eight_bit import eight_bit, EightBitState

__all__ = [
    "Codes",
    "EightBitState",
    "captured_energy",
    "eight_bit",
    "gram_basis",
    "subspace_iteration",
    "svd_basis",
]
