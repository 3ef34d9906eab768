"""Statistics of a model over a few batches, what is rewritten by them, and what is trained on a few."""

from peftjax.calibrate.activations import activation_ranges
from peftjax.calibrate.gradients import fisher_information, mean_gradient
from peftjax.calibrate.inputs import InputStatistics, input_statistics
from peftjax.calibrate.reconstruction import Reconstruction, reconstruct
from peftjax.calibrate.reparameterization import Reparameterized, migrate_outliers, reparameterize

__all__ = [
    "InputStatistics",
    "Reconstruction",
    "Reparameterized",
    "activation_ranges",
    "fisher_information",
    "input_statistics",
    "mean_gradient",
    "migrate_outliers",
    "reconstruct",
    "reparameterize",
]
