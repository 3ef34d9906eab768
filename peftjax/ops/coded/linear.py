"""A product with a weight whose gradient is taken at a stand-in for its input.

    y = x · W          dx = g · Wᵀ          dW = x̂ᵀ · g

written as two products, `x · sg(W)` and, of which only the derivative counts, `x̂ · W`. So any weight may
take part, also a structured one: each part that is trained keeps what it needs of x̂, and none keeps x. The
second product's value is used by nothing and is dropped by the compiler.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero


@partial(jax.tree_util.register_dataclass, data_fields=["value", "stand_in"], meta_fields=[])
@dataclass(frozen=True)
class Input:
    """What enters a linear layer.

    Attributes:
        value: the array.
        stand_in: makes x̂ of the codes it holds, a `jax.tree_util.Partial` without arguments.
    """

    value: Array
    stand_in: Callable[[], Array]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""
        return self.value.shape


def product_at(x: Input, weight: Array, product: Callable[[Array, Array], Array]) -> Array:
    """`product(x.value, weight)`, bilinear, with the gradient of `weight` taken at the stand-in."""
    y = product(x.value, lax.stop_gradient(weight))
    return with_tangent_of(y, product(lax.stop_gradient(x.stand_in()).astype(x.value.dtype), weight))


@jax.custom_jvp
def with_tangent_of(y: Array, z: Array) -> Array:
    """`y`, whose derivative is that of `y + z`."""
    return y


def _rule(primals: tuple[Array, Array], tangents: tuple[Any, Any]) -> tuple[Array, Any]:
    # A zero that is not made is not kept for the backward pass either.
    given = [tangent for tangent in tangents if not isinstance(tangent, SymbolicZero)]
    return primals[0], sum(given[1:], start=given[0]) if given else jnp.zeros_like(primals[0])


with_tangent_of.defjvp(_rule, symbolic_zeros=True)
