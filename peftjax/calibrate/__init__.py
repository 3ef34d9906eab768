"""Statistics of a model over a few batches, what is rewritten by them, and what is trained on a few."""

from peftjax.calibrate.activations import activation_ranges
from peftjax.calibrate.curvature import CurvatureFactors, Edited, curvature_factors, keep_curvature
from peftjax.calibrate.gradients import fisher_information, mean_gradient
from peftjax.calibrate.inputs import InputStatistics, input_statistics
from peftjax.calibrate.reconstruction import Reconstruction, reconstruct
from peftjax.calibrate.reparameterization import Reparameterized, migrate_outliers, reparameterize

__all__ = [
    "CurvatureFactors",
    "Edited",
    "InputStatistics",
    "Reconstruction",
    "Reparameterized",
    "activation_ranges",
    "curvature_factors",
    "fisher_information",
    "input_statistics",
    "keep_curvature",
    "mean_gradient",
    "migrate_outliers",
    "reconstruct",
    "reparameterize",
]
