"""An array that holds trained values already: forward returns it, backward gives them their gradient."""

from collections.abc import Callable
from typing import Any

import jax
from jax import Array

from peftjax.core.derivatives import with_backward

Take = Callable[..., Array]


def with_gradient_at(take: Take, scale: float, w: Array, values: Array, places: tuple[Array, ...]) -> Array:
    """`w`, which holds `scale · values` at `places`; their gradient is what `take` finds in that of w.

    Args:
        take: `(array like w, *places) -> array like values`.
        scale: of the values.
        w: the weight.
        values: what is trained, any floating dtype.
        places: integer arrays.
    """

    def forward(w: Array, values: Array, places: tuple[Array, ...]) -> tuple[Array, Any]:
        return with_gradient_at(take, scale, w, values, places), (values, places)

    def backward(residuals: Any, g: Array) -> tuple[Array, Array, None]:
        values, places = residuals
        return g, scale * take(g, *places).astype(values.dtype), None

    return with_backward(lambda w, values, places: w, forward, backward)(w, values, places)


def with_gradient_through(product: Any, y: Array, z: Array, values: Array) -> Array:
    """`y`, which holds `product(z, values)` already; backward keeps z and gives the values their gradient."""

    def forward(y: Array, z: Array, values: Array) -> tuple[Array, tuple[Array, Array]]:
        return with_gradient_through(product, y, z, values), (z, values)

    def backward(residuals: tuple[Array, Array], g: Array) -> tuple[Array, None, Array]:
        z, values = residuals
        _, pull = jax.vjp(lambda values: product(z, values).astype(g.dtype), values)
        return g, None, pull(g)[0]

    return with_backward(lambda y, z, values: y, forward, backward)(y, z, values)
