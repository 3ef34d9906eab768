"""What the kernels share: matrices of a stack one by one, and the types of what they make."""

from collections.abc import Callable, Mapping
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.typing import DTypeLike


def by_matrix(body: Callable[..., Array], operands: tuple[Array | None, ...], **static: Any) -> Array:
    """`body` on matrices `x [n, in]`, `codes [out, ...]`, ..., mapped over the stack if there is one."""
    x, codes = operands[:2]
    stack, lead = codes.shape[:-2], x.shape[codes.ndim - 2 : -1]

    def matrices(array: Array | None, rows: tuple[int, ...]) -> Array | None:
        if array is None:
            return None
        return array.reshape(*([prod(stack)] if stack else []), prod(rows), array.shape[-1])

    rows = [lead, *(None if part is None else part.shape[-2:-1] for part in operands[1:])]
    if operands[4] is not None:
        rows[4] = lead
    flat = [matrices(array, of) for array, of in zip(operands, rows)]
    run = partial(body, **static)
    y = jax.vmap(run)(*flat) if stack else run(*flat)
    return y.reshape(*stack, *lead, y.shape[-1])


def type_like(x: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Any:
    """The type of an output: in a `shard_map` it varies over the mesh axes that x varies over."""
    return jax.eval_shape(lambda x: jnp.broadcast_to(x.ravel()[0].astype(dtype), shape), x)


def cost(made: Any, given: Mapping[str, Array]) -> pl.CostEstimate:
    """What making y takes: the products, and every array read or written once."""
    rank = given["u"].shape[1] if "u" in given else 0
    arrays = [made, *given.values()]
    return pl.CostEstimate(
        flops=2 * made.shape[0] * made.shape[1] * (given["x"].shape[1] + rank),
        bytes_accessed=sum(array.size * array.dtype.itemsize for array in arrays),
        transcendentals=0,
    )


def of_one_dtype(u: Array, v: Array) -> tuple[Array, Array]:
    """Low-rank factors in the wider of their dtypes."""
    dtype = jnp.promote_types(u.dtype, v.dtype)
    return u.astype(dtype), v.astype(dtype)
