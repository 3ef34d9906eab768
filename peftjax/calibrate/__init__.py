"""Statistics of a model over a few batches."""

from peftjax.calibrate.gradients import fisher_information, mean_gradient

__all__ = ["fisher_information", "mean_gradient"]
