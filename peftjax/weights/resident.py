"""An array that holds trained values already: forward it is as it is, backward they get their gradient."""

from collections.abc import Callable
from functools import partial
from typing import Any

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


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def followed(product: Any, y: Array, z: Array, values: Array) -> Array:
    """`y`, which holds `product(z, values)` already; backward keeps z and gives the values their gradient."""
    return y


def _keep_thin(product: Any, y: Array, z: Array, values: Array) -> tuple[Array, tuple[Array, Array]]:
    return y, (z, values)


def _pull_values(product: Any, kept: tuple[Array, Array], g: Array) -> tuple[Array, None, Array]:
    z, values = kept
    _, pull = jax.vjp(lambda values: product(z, values).astype(g.dtype), values)
    return g, None, pull(g)[0]


followed.defvjp(_keep_thin, _pull_values)
