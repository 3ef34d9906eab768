"""Dropout on the input of an adapter: its mask is recomputed from a key in the backward pass."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_batching import custom_vmap


def drop(x: Array, rate: float, key: Array) -> Array:
    """`x` with a share of its entries zero and the others scaled up."""
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype))


def key_for_input(keys: Array, x: Array) -> Array:
    """One key for the mask of a whole input, or one for each example of a `vmap` over that input.

    A stack has a key for each of its matrices. A mask of the input's shape covers the axes that it shares
    with the stack, so that the first key is enough.
    """
    key = keys[(0,) * _stacked_axes(keys)]
    if x.size == 0:
        return key
    # One number of x says whether x is mapped; nothing is read from it.
    return _of_example(key, lax.stop_gradient(lax.slice(x, (0,) * x.ndim, (1,) * x.ndim)).reshape(()))


def with_number(keys: Array, number: Any) -> Array:
    """Keys of any shape, each with a number folded in."""
    fold: Callable[..., Array] = jax.random.fold_in
    for _ in range(_stacked_axes(keys)):
        fold = jax.vmap(fold, in_axes=(0, None))
    return fold(keys, number)


def _stacked_axes(keys: Array) -> int:
    """The number of axes of an array of keys; an old one of raw words has one more."""
    return keys.ndim - (not jnp.issubdtype(keys.dtype, jax.dtypes.prng_key))


@custom_vmap
def _of_example(key: Array, number: Array) -> Array:
    return key


@_of_example.def_vmap
def _of_examples(size: int, mapped: list[bool], key: Array, number: Array) -> tuple[Array, bool]:
    if mapped[0] or not mapped[1]:
        return key, mapped[0]
    return jax.random.split(_of_example(key, number[0]), size), True
