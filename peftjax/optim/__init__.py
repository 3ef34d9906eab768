"""Optimizers and rewrites of optimizers, as optax gradient transformations."""

from peftjax.optim._adamp import adamp
from peftjax.optim._adamw import adamw, decay_updated_weights, scale_by_released_adam
from peftjax.optim._eight_bit import EightBitState, eight_bit
from peftjax.optim._fira import fira
from peftjax.optim._galore import galore
from peftjax.optim._sgdp import sgdp
from peftjax.optim.bases import captured_energy, gram_basis, subspace_iteration, svd_basis
from peftjax.optim.nap import normalize_and_project
from peftjax.optim.natural import natural_galore, scale_by_natural_gradient
from peftjax.optim.projection import project
from peftjax.optim.radial import remove_radial
from peftjax.optim.row_adam import row_adamw, scale_by_row_adam
from peftjax.optim.schedules import cosine_with_restarts
from peftjax.quantize import Codes

__all__ = [
    "Codes",
    "EightBitState",
    "adamp",
    "adamw",
    "captured_energy",
    "cosine_with_restarts",
    "decay_updated_weights",
    "eight_bit",
    "fira",
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
