"""Optimizers as optax transformations."""

from peftjax.optim.blockwise import Codes
from peftjax.optim.eight_bit import EightBitState, eight_bit

__all__ = [
    "Codes",
    "EightBitState",
    "eight_bit",
]
