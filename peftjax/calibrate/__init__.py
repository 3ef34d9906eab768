"""Statistics of a model over a few batches."""

from peftjax.calibrate.fisher import fisher_information
from peftjax.calibrate.gradients import mean_gradient

__all__ = ["fisher_information", "mean_gradient"]
