"""Optimizers and rewrites of optimizers, as optax gradient transformations."""

from peftjax.optim.adamp import adamp
from peftjax.optim.adamw import adamw, decay_updated_weights, scale_by_released_adam
from peftjax.optim.nap import normalize_and_project
from peftjax.optim.radial import remove_radial
from peftjax.optim.sgdp import sgdp

__all__ = [
    "adamp",
    "adamw",
    "decay_updated_weights",
    "normalize_and_project",
    "remove_radial",
    "scale_by_released_adam",
    "sgdp",
]
