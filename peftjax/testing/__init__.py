"""Checks of what every method, weight and optimizer of this library does, for those of other packages.

    import peftjax as pj
    import peftjax.testing

    pj.testing.check_method(my_method(rank=2))
    pj.testing.check_weight(MyWeight(...))
    pj.testing.check_optimizer(my_optimizer(1e-3))

Each raises an `AssertionError` that says what failed. The tests of this project run the same checks.
"""

from peftjax.testing.methods import Case, check_method
from peftjax.testing.model import Model, small_model
from peftjax.testing.optimizers import check_optimizer
from peftjax.testing.weights import check_weight

__all__ = ["Case", "Model", "check_method", "check_optimizer", "check_weight", "small_model"]
