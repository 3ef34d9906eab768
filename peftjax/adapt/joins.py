"""Equations that make one weight of several, or mix its axes: what comes out acts part by part.

They are evaluated where the user does not accept the dense array.
"""

from collections.abc import Callable
from typing import Any

from peftjax.adapt.views import reordered
from peftjax.weights.merged import regrouped


def _reshape(eqn: Any, operands: list[Any]) -> Any:
    weight = reordered(eqn, operands)
    return None if weight is None else regrouped(weight, eqn.params["new_sizes"])


JOINS: dict[str, Callable[[Any, list[Any]], Any]] = {
    "reshape": _reshape,
}
