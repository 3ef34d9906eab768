"""Optimizers and rewrites of optimizers, as optax gradient transformations."""

from peftjax.optim.adamp import adamp
from peftjax.optim.adamw import adamw, decay_updated_weights, scale_by_released_adam
from peftjax.optim.bases import captured_energy, gram_basis, subspace_iteration, svd_basis
from peftjax.optim.blockwise import Codes
from peftjax.optim.eight_bit import EightBitState, eight_bit
from peftjax.optim.galore import galore
from peftjax.optim.nap import normalize_and_project
from peftjax.optim.natural import natural_galore, scale_by_natural_gradient
from peftjax.optim.projection import project
from peftjax.optim.radial import remove_radial
from peftjax.optim.row_adam import row_adamw, scale_by_row_adam
from peftjax.optim.sgdp import sgdp

__all__ = [
    "Codes",
    "EightBitState",
    "adamp",
    "adamw",
    "captured_energy",
    "decay_updated_weights",
    "eight_bit",
    "galore",
    "gram_basis",
    "natural_galore",
    "normalize_and_project",
    "project",
    "remove_radial",
    "row_adamw",
    "scale_by_natural_gradient",
    "scale_by_released_adam",
    "scale_by_row_adam",
    "sgdp",
    "subspace_iteration",
    "svd_basis",
]
