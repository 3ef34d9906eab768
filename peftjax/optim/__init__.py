"""Optimizers and rewrites of optimizers, as optax gradient transformations."""

from peftjax.optim.row_adam import row_adamw, scale_by_row_adam

__all__ = [
    "row_adamw",
    "scale_by_row_adam",
]
