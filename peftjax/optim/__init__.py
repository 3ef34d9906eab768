"""Optimizers and rewrites of optimizers, as optax gradient transformations."""

from peftjax.optim.bases import captured_energy as captured_energy
from peftjax.optim.bases import gram_basis as gram_basis
from peftjax.optim.bases import subspace_iteration as subspace_iteration
from peftjax.optim.bases import svd_basis as svd_basis
from peftjax.optim.galore import galore as galore
from peftjax.optim.natural import natural_galore as natural_galore
from peftjax.optim.natural import scale_by_natural_gradient as scale_by_natural_gradient
from peftjax.optim.projection import project as project
