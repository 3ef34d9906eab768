"""A low-rank weight whose gradient reads its input from one number for each group of features."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from peftjax.core.derivatives import with_backward
from peftjax.weights.base import contract
from peftjax.weights.contraction import Dot
from peftjax.weights.dropout import drop, key_for_input
from peftjax.weights.fields import canonical, static, structured
from peftjax.weights.low_rank import LowRank, Product, low_rank_dot, met_side


@structured
class Compressed(LowRank):
    """`y = x·base + scale · (x·aᵀ)·b`, whose gradient of `a` has x̂ for x.

    x is cut into `groups` parts of its features, of which backward keeps the products with one unit vector v:
    `x̂ = strength · (x_g · v) v`, part by part. The gradient of x is exact.

    Attributes:
        direction: v, `[*stack, ceil(in / groups)]`; None takes the mean of all parts of the input at hand.
        groups: how many numbers of x are kept.
        strength: the factor of x̂.
    """

    direction: Array | None = canonical(default=None)
    groups: int = static(default=1)
    strength: float = static(default=1.0)

    def dot(self, x: Array, rule: Dot) -> Array:
        """The same product; what is no plain product of inputs keeps x."""
        plain = not rule.w_batch and not self.layout.stack and met_side(self.layout, rule) == "i"
        if not plain:
            return super().dot(x, rule)
        entered = self.layout.positions("i")
        order = tuple(rule.x_contract[rule.w_contract.index(p)] for p in entered)
        enter = partial(self._enter_compressed, order)
        y = contract(x, self.base, rule)
        delta = low_rank_dot(x, self.a, self.b, self.scale, rule, self.layout, "i", enter)
        return y + delta.astype(y.dtype)

    def _enter_compressed(self, order: tuple[int, ...], product: Product, x: Array, first: Array) -> Array:
        """`x·first`, of which backward keeps the products of the parts of x with v."""
        free = tuple(n for n in range(x.ndim) if n not in order)
        sizes = tuple(x.shape[n] for n in order)
        rate = self.dropout
        keys = () if self.key is None or rate == 0.0 else (key_for_input(self.key, x),)
        fixed = () if self.direction is None else (lax.stop_gradient(self.direction),)

        def given(x: Array, key: tuple[Array, ...]) -> Array:
            return drop(x, rate, key[0]) if key else x

        def plain(x: Array, first: Array, key: tuple[Array, ...], fixed: tuple[Array, ...]) -> Array:
            return product(given(x, key), first)

        def forward(x: Array, first: Array, key: Any, fixed: Any) -> tuple[Array, Any]:
            rows = lax.transpose(given(x, key), (*free, *order))
            parts = in_groups(rows.reshape(*rows.shape[: len(free)], -1), self.groups)
            v = fixed[0].astype(x.dtype) if fixed else mean_direction(parts)
            return plain(x, first, key, fixed), (parts @ v, v, first, key)

        def backward(kept: Any, g: Array) -> tuple[Any, ...]:
            numbers, v, first, key = kept
            nothing = jnp.zeros(x.shape, x.dtype)
            (of_x,) = jax.vjp(lambda x: product(given(x, key), first), nothing)[1](g)
            rows = self.strength * (numbers[..., None] * v)
            rows = rows.reshape(*rows.shape[:-2], -1)[..., : math.prod(sizes)]
            apart = rows.reshape(*rows.shape[:-1], *sizes)
            at = (*free, *order)
            again = lax.transpose(apart, sorted(range(len(at)), key=at.__getitem__))
            (of_first,) = jax.vjp(lambda first: product(again, first), first)[1](g)
            return of_x, of_first, None, None

        return with_backward(plain, forward, backward)(x, first, keys, fixed)


def in_groups(x: Array, groups: int) -> Array:
    """`[..., n]` as `[..., groups, ceil(n / groups)]`, filled up with zeros."""
    width = -(-x.shape[-1] // groups)
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, groups * width - x.shape[-1])])
    return padded.reshape(*x.shape[:-1], groups, width)


def mean_direction(parts: Array) -> Array:
    """The direction of the mean of all parts, of length one; that of equal numbers where the mean is zero."""
    mean = parts.astype(jnp.float32).mean(tuple(range(parts.ndim - 1)))
    mean = jnp.where(jnp.any(mean != 0.0), mean, jnp.ones_like(mean))
    return (mean / jnp.linalg.norm(mean)).astype(parts.dtype)
