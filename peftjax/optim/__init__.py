"""Optimizers and rewrites of optimizers, as optax gradient transformations."""

from peftjax.optim.bases import captured_energy, gram_basis, subspace_iteration, svd_basis
from peftjax.optim.galore import galore
from peftjax.optim.natural import natural_galore, scale_by_natural_gradient
from peftjax.optim.projection import project

__all__ = [
    "captured_energy",
    "galore",
    "gram_basis",
    "natural_galore",
    "project",
    "scale_by_natural_gradient",
    "subspace_iteration",
    "svd_basis",
]
