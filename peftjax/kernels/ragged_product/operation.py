"""Rows in the order of their groups times the matrices of the groups, as `jax.lax.ragged_dot` has it.

    y_i = x_i W_e         i in group e        `ragged_product`
    W_e = sum_i x_iᵀ g_i  i in group e        `ragged_outer`, which gives the gradient of W

XLA (of jax 0.10, and a TPU's in libtpu 0.0.52) masks all rows for each of E groups, which takes E times the
arithmetic and E copies of x; here the rows go a tile at a time, each with the matrix of its group:

    tiles <= n / t + E of t rows     a tile's rows beyond its group are overwritten by the next one's

so that the arithmetic is (1 + E t / n) times that of the product at most, 1.5 where n is large, and nothing
is copied E times. Of matrices made of parts, such as codes, one exists at a time: `ragged_product_of`.
Programs that XLA partitions over devices take `jax.lax.ragged_dot`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from peftjax.core import compat, primitives
from peftjax.core.derivatives import with_backward
from peftjax.kernels.ragged_product import tiled


def ragged_product(
    x: Float[Array, "n D"],
    w: Float[Array, "E _ _"],
    sizes: Int[Array, " E"],
    *,
    transposed: bool = False,
    preferred: Any = None,
) -> Float[Array, "n F"]:
    """Each row of x times its group's matrix; zero for rows beyond all groups.

    Args:
        x: those of group 0 first, and so on.
        w: [E, D, F] of any floating dtype; [E, F, D] if transposed.
        sizes: how many rows each group has.
        transposed: `y_i = x_i W_eᵀ`.
        preferred: dtype of the result; by default that of x and w.
    """
    dtype = jnp.promote_types(x.dtype, w.dtype)
    preferred = jnp.dtype(dtype if preferred is None else preferred)
    # Inside a shard_map, what all devices share is cast first: its gradient is then summed over them.
    x, w, sizes = compat.varying_alike((x.astype(dtype), w.astype(dtype), sizes))
    return _product(x, w, sizes, transposed=transposed, preferred=preferred)[0]


def ragged_outer(
    x: Float[Array, "n D"], g: Float[Array, "n F"], sizes: Int[Array, " E"], *, preferred: Any = None
) -> Float[Array, "E D F"]:
    """The sums over each group's rows of their outer products."""
    dtype = jnp.promote_types(x.dtype, g.dtype)
    preferred = jnp.dtype(dtype if preferred is None else preferred)
    x, g, sizes = compat.varying_alike((x.astype(dtype), g.astype(dtype), sizes))
    return _outer(x, g, sizes, preferred=preferred)[0]


def ragged_product_of(
    x: Float[Array, "n D"],
    parts: Any,
    sizes: Int[Array, " E"],
    *,
    decode: Callable[[Any], Float[Array, "D F"]],
    transposed: bool = False,
    preferred: Any = None,
) -> Float[Array, "n F"]:
    """`ragged_product` with matrices that are made of parts: in tiles, one exists at a time.

    The gradient is that of x: parts are constants.

    Args:
        x: as in `ragged_product`.
        parts: a tree of arrays `[E, ...]`.
        sizes: as in `ragged_product`.
        decode: makes a group's matrix, of the dtype of x, of its parts; a function that can be hashed.
        transposed: as in `ragged_product`.
        preferred: as in `ragged_product`.
    """
    leaves, structure = jax.tree.flatten(parts)
    x, sizes, *leaves = compat.varying_alike((x, sizes, *leaves))
    preferred = jnp.dtype(x.dtype if preferred is None else preferred)
    static = {"decode": decode, "structure": structure}

    def of(x: Array, sizes: Array, *leaves: Array, transposed: bool, preferred: Any) -> Array:
        def run(*operands: Array) -> Array:
            return _of_parts(*operands, transposed=transposed, preferred=preferred, **static)[0]

        def forward(*operands: Array) -> tuple[Array, Any]:
            return run(*operands), operands[1:]

        def backward(kept: Any, y: Array) -> tuple[Any, ...]:
            g = y.astype(x.dtype)
            return of(g, *kept, transposed=not transposed, preferred=x.dtype), *[None] * len(kept)

        return with_backward(run, forward, backward)(x, sizes, *leaves)

    return of(x, sizes, *leaves, transposed=transposed, preferred=preferred)


def numbers_of_product(transposed: bool) -> lax.RaggedDotDimensionNumbers:
    """Which axes the product is over, as `jax.lax.ragged_dot_general` says it."""
    return lax.RaggedDotDimensionNumbers((((1,), (2 if transposed else 1,)), ((), ())), (0,), (0,))


_OF_OUTER = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())


def _plain_product(x: Array, w: Array, sizes: Array, *, transposed: bool, preferred: Any) -> list[Array]:
    numbers = numbers_of_product(transposed)
    return [lax.ragged_dot_general(x, w, sizes, numbers, preferred_element_type=preferred)]


def _plain_outer(x: Array, g: Array, sizes: Array, *, preferred: Any) -> list[Array]:
    return [lax.ragged_dot_general(x, g, sizes, _OF_OUTER, preferred_element_type=preferred)]


def _product_in_tiles(x: Array, w: Array, sizes: Array, **static: Any) -> list[Array]:
    return [tiled.product(x, w, sizes, decode=lambda matrix: matrix, **static)]


def _plain_of_parts(
    x: Array, sizes: Array, *leaves: Array, decode: Any, structure: Any, **static: Any
) -> list[Array]:
    matrices = jax.vmap(decode)(jax.tree.unflatten(structure, leaves))
    return _plain_product(x, matrices, sizes, **static)


def _of_parts_in_tiles(
    x: Array, sizes: Array, *leaves: Array, decode: Any, structure: Any, **static: Any
) -> list[Array]:
    parts = jax.tree.unflatten(structure, leaves)
    return [tiled.product(x, parts, sizes, decode=decode, **static)]


def _one_by_one(op: Callable[..., list[Array]], arrays: Sequence[Array], axes: Any, **static: Any) -> Any:
    """The operation mapped over an axis, one after the other: their rows lie in groups of other sizes."""
    mapped = {n: jnp.moveaxis(arrays[n], axis, 0) for n, axis in enumerate(axes) if axis is not None}
    return lax.map(lambda one: op(*(one.get(n, array) for n, array in enumerate(arrays)), **static), mapped)


def _with_axes(op: Callable[..., list[Array]], arrays: Sequence[Array], axes: Any, **static: Any) -> Any:
    out = _one_by_one(op, arrays, axes, **static)
    return out, [0] * len(out)


def _by_platform(
    name: str, plain: Callable[..., list[Array]], in_tiles: Callable[..., list[Array]]
) -> Callable[..., list[Array]]:
    def one_by_one(arrays: Sequence[Array], axes: Any, **static: Any) -> Any:
        return _with_axes(chosen, arrays, axes, **static)

    platforms = dict.fromkeys(("cpu", "cuda", "rocm", "tpu"), in_tiles)
    chosen = primitives.by_platform(name, plain, platforms, batched=one_by_one)
    return chosen


def _operation(
    name: str, plain: Callable[..., list[Array]], in_tiles: Callable[..., list[Array]], backward: Any
) -> Callable[..., list[Array]]:
    """A product that is one equation until it is differentiated, and whose gradients are such ones too."""
    chosen = _by_platform(f"{name}_in_tiles", plain, in_tiles)

    def differentiable(moving: Sequence[bool], operands: Sequence[Any], **static: Any) -> Any:
        def whole(values: Sequence[Any]) -> list[Any]:
            given = iter(values)
            return [next(given) if moves else operand for operand, moves in zip(operands, moving)]

        def product(*values: Any) -> list[Array]:
            return chosen(*whole(values), **static)

        def forward(*values: Any) -> tuple[list[Array], Any]:
            left, right, sizes = whole(values)
            # Each of the two is what the other's gradient needs.
            kept = left if moving[1] else None, right if moving[0] else None, sizes
            return product(*values), kept

        def pull(kept: Any, cotangents: list[Array]) -> tuple[Array, ...]:
            types = [jax.typeof(operand).dtype for operand in operands]
            return tuple(backward[n](*kept, cotangents[0], types[n], **static) for n in (0, 1) if moving[n])

        return with_backward(product, forward, pull)

    return primitives.one_equation(name, chosen, differentiable, partial(_one_by_one, chosen), None)


# Of an operand that only the other's gradient needs there is None, where that is not asked for.


def _x_of_product(x: Any, w: Array, sizes: Array, y: Array, dtype: Any, transposed: bool, **_: Any) -> Array:
    return ragged_product(y, w, sizes, transposed=not transposed, preferred=dtype)


def _w_of_product(x: Array, w: Any, sizes: Array, y: Array, dtype: Any, transposed: bool, **_: Any) -> Array:
    return ragged_outer(*((y, x) if transposed else (x, y)), sizes, preferred=dtype)


def _x_of_outer(x: Any, g: Array, sizes: Array, w: Array, dtype: Any, **_: Any) -> Array:
    return ragged_product(g, w, sizes, transposed=True, preferred=dtype)


def _g_of_outer(x: Array, g: Any, sizes: Array, w: Array, dtype: Any, **_: Any) -> Array:
    return ragged_product(x, w, sizes, preferred=dtype)


PRODUCT, OUTER = "ragged_product", "ragged_outer"
"""The names of the equations."""
_product = _operation(PRODUCT, _plain_product, _product_in_tiles, (_x_of_product, _w_of_product))
_of_parts = _by_platform("ragged_product_of_parts", _plain_of_parts, _of_parts_in_tiles)
_outer = _operation(OUTER, _plain_outer, tiled.outer, (_x_of_outer, _g_of_outer))
