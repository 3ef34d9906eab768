"""The error that rounding adds to the inverse of a reversible stack."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from peftjax.ops.reversible.coupling import Coupling, Pair, Plan
from peftjax.ops.reversible.stack import Branch


def inverse_errors(
    f: Branch, g: Branch, pair: Pair, shared: Any, layers: Any, coupling: Coupling, *, every: int = 0
) -> Float[Array, " L"]:
    """The largest absolute error of each layer's recomputed inputs; see `reversible`."""

    def of(layer: Any) -> Iterator[Callable[[Array], Array]]:
        return (partial(branch, shared, layer) for branch in (f, g))

    def forward(pair: Pair, layer: Any) -> tuple[Pair, Pair]:
        return coupling.forward(*of(layer), pair), pair

    def backward(pair: Pair, xs: Any) -> tuple[Pair, Array]:
        layer, (exact1, exact2), is_kept = xs
        of_f, of_g = of(layer)
        y1, y2 = coupling.ordered(pair)
        x2 = jnp.where(is_kept, exact2, coupling.before_g(y2, of_g(y1)))
        x1 = jnp.where(is_kept, exact1, coupling.before_f(y1, of_f(x2)))
        return (x1, x2), jnp.maximum(jnp.abs(x1 - exact1).max(), jnp.abs(x2 - exact2).max())

    last, exact = lax.scan(forward, pair, layers)
    length = exact[0].shape[0]
    _, _, is_kept = Plan(coupling, length, min(every or length, length), 0).slots()
    return lax.scan(backward, last, (layers, exact, jnp.asarray(is_kept)), reverse=True)[1]
