"""Statistics of a model over a few batches, and what is trained on a few."""

from peftjax.calibrate.gradients import fisher_information, mean_gradient
from peftjax.calibrate.reconstruction import Reconstruction, reconstruct

__all__ = ["Reconstruction", "fisher_information", "mean_gradient", "reconstruct"]
