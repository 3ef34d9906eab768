"""An array that holds trained values already: forward it is as it is, backward they get their gradient."""

from collections.abc import Callable
from functools import partial

import jax
from jax import Array

Take = Callable[..., Array]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def resident(take: Take, scale: float, w: Array, values: Array, places: tuple[Array, ...]) -> Array:
    """`w`, which holds `scale · values` at `places`; their gradient is what `take` finds in that of w.

    Args:
        take: `(array like w, *places) -> array like values`.
        scale: of the values.
        w: the weight.
        values: what is trained, any floating dtype.
        places: integer arrays.
    """
    return w


def _forward(take: Take, scale: float, w: Array, values: Array, places: tuple[Array, ...]) -> tuple:
    return w, (values, places)


def _backward(take: Take, scale: float, kept: tuple, g: Array) -> tuple[Array, Array, None]:
    values, places = kept
    return g, scale * take(g, *places).astype(values.dtype), None


resident.defvjp(_forward, _backward)
