"""Rewrites of gradients and optimizer states, as optax gradient transformations."""

from peftjax.optim.bases import captured_energy as captured_energy
from peftjax.optim.bases import gram_basis as gram_basis
from peftjax.optim.bases import subspace_iteration as subspace_iteration
from peftjax.optim.bases import svd_basis as svd_basis
