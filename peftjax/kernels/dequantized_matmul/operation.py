"""The product as an operation, in a program for one device or in a device's own code: a kernel on a TPU and
on an NVIDIA GPU, jnp that looks bytes up on a CPU. Elsewhere, wherever XLA partitions the program, and under
mesh axes of type Explicit it is jnp that XLA may partition.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding

from peftjax.core import compat, primitives
from peftjax.core.derivatives import with_backward
from peftjax.core.errors import PeftError
from peftjax.core.sharding import explicit_sharding
from peftjax.kernels.dequantized_matmul import explicit, gpu, reference, tpu
from peftjax.kernels.dequantized_matmul.element import Table


def dequantized_matmul(
    x: Array,
    codes: Array,
    scales: Array,
    shifts: Array | None = None,
    u: Array | None = None,
    v: Array | None = None,
    *,
    table: Table | None,
    group: int,
    transposed: bool = False,
) -> Array:
    """`y = x W + u v` with a weight that is only ever held as codes, `[..., out]` in x's dtype.

        W[i, o] = element(code[o, i]) · scales[o, i // group] (+ shifts[o, i // group])

    Weights are decoded in float32, rounded once to x's dtype, and the products summed in float32. Leading
    axes of x and u may be any; `vmap` maps any of the arrays, a stack of weights too.

    The gradient keeps codes, scales and shifts, and u and v where they are given; x and W are not kept. It is
    that of x, u and v: scales and shifts are constants, whose gradient is zero.

    Args:
        x: floats `[..., in]`; `[..., out]` if transposed.
        codes: with a table uint8 `[out, in / 2]`, of each pair along `in` the first in the high bits; without
            one int8 `[out, in]`, whose elements are the integers themselves.
        scales: floats `[out, in / group]`.
        shifts: floats of the scales' shape.
        u: floats `[..., r]`, a low-rank product's left factor.
        v: floats `[r, out]`; `[r, in]` if transposed.
        table: the 16 elements that codes stand for; None for int8 codes.
        group: how many neighbors along `in` share a scale; it divides `in`.
        transposed: `x Wᵀ + u v`, `[..., in]`, the product that gradients of the inputs are.

    Raises:
        PeftError: if shapes or dtypes do not fit each other.
    """
    _check(x, codes, scales, shifts, u, v, table, group, transposed)
    static = {"table": table, "group": group, "transposed": transposed}
    # Inside a shard_map, what all devices share is cast first: its gradient is then summed over them.
    return _product(static, *compat.varying_alike((x, codes, scales, shifts, u, v)))


def _product(static: dict[str, Any], *operands: Array | None) -> Array:
    def forward(*operands: Array | None) -> tuple[Array, tuple]:
        return _product(static, *operands), operands[1:]

    backward = partial(_gradients, static, explicit_sharding(operands[0]))
    return with_backward(partial(_chosen, **static), forward, backward)(*operands)


def _gradients(static: dict[str, Any], of_x: NamedSharding | None, kept: tuple, g: Array) -> tuple:
    codes, scales, shifts, u, v = kept
    other = {**static, "transposed": not static["transposed"]}
    x_bar = _product(other, g, codes, scales, shifts, None, None)
    x_bar = x_bar if of_x is None else jax.sharding.reshard(x_bar, of_x)
    if u is None:
        return x_bar, None, None, None, None, None
    dtype, lead = jnp.result_type(g, u, v), tuple(range(g.ndim - 1))

    def u_bar(g: Array, v: Array) -> Array:
        return reference.product(g.astype(dtype), v.astype(dtype), -1).astype(u.dtype)

    def v_bar(u: Array, g: Array) -> Array:
        summed = jnp.tensordot(
            u.astype(dtype), g.astype(dtype), (lead, lead), preferred_element_type=jnp.float32
        )
        return summed.astype(v.dtype)

    u_bar, v_bar = (
        explicit.with_sharding(f, explicit_sharding(like)) for f, like in ((u_bar, u), (v_bar, v))
    )
    return x_bar, None, None, None, u_bar(g, v), v_bar(u, g)


def _chosen(*operands: Array | None, **static: Any) -> Array:
    sharding = explicit.of_product(operands, static["transposed"])
    if sharding is not None:
        return explicit.with_sharding(partial(reference.matmul, **static), sharding)(*operands)
    leaves, structure = jax.tree.flatten(operands)
    return _bind(*leaves, structure=structure, **static)[0]


def _flat(body: Callable[..., Array], *leaves: Array, structure: Any, **static: Any) -> list[Array]:
    return [body(*jax.tree.unflatten(structure, leaves), **static)]


def _over_axis(arrays: Sequence[Array], axes: Sequence[int | None], **static: Any) -> tuple | None:
    """Mapped inputs of one weight are more rows of x; None where the weight is mapped too.

    Where the branch is mapped and x or v is not mapped as u is, the branch is a product of its own.
    """
    given = jax.tree.unflatten(static["structure"], arrays)
    over = jax.tree.unflatten(static["structure"], [-1 if axis is None else axis for axis in axes])
    x, *stored, u, v = given
    if any(axis not in (None, -1) for axis in over[1:4]):
        return None
    (size,) = {array.shape[axis] for array, axis in zip(arrays, axes) if axis is not None}
    stack = stored[0].ndim - 2

    def behind_the_stack(array: Array, axis: int) -> Array:
        if axis != -1:
            return jnp.moveaxis(array, axis, stack)
        array = jnp.expand_dims(array, stack)
        return jnp.broadcast_to(array, (*array.shape[:stack], size, *array.shape[stack + 1 :]))

    def product(*operands: Array | None) -> Array:
        leaves, structure = jax.tree.flatten(operands)
        return _bind(*leaves, **{**static, "structure": structure})[0]

    x = x if over[0] == -1 else behind_the_stack(x, over[0])
    if over[0] != -1 and over[5] in (None, -1):
        u = None if u is None else behind_the_stack(u, over[4])
        return [product(x, *stored, u, v)], [stack]
    y = product(x, *stored, None, None)
    y = y[None] if over[0] == -1 else jnp.moveaxis(y, stack, 0)
    of_branch = tuple(None if axis == -1 else axis for axis in over[4:])
    branch = jax.vmap(reference.low_rank, of_branch)(u, v)
    return [(y.astype(branch.dtype) + branch).astype(y.dtype)], [0]


_bind = primitives.by_platform(
    "dequantized_matmul",
    partial(_flat, reference.matmul),
    {
        "cpu": partial(_flat, partial(reference.matmul, lookups=True)),
        "cuda": partial(_flat, gpu.matmul),
        "tpu": partial(_flat, tpu.matmul),
    },
    batched=_over_axis,
)


def _check(
    x: Array,
    codes: Array,
    scales: Array,
    shifts: Array | None,
    u: Array | None,
    v: Array | None,
    table: Table | None,
    group: int,
    transposed: bool,
) -> None:
    dtype, per_byte = ("int8", 1) if table is None else ("uint8", 2)
    if codes.dtype != dtype or codes.ndim != 2 or (table is not None and len(table) != 16):
        raise PeftError(
            f"dequantized_matmul: codes are {codes.dtype}{list(codes.shape)} and table has "
            f"{'no' if table is None else len(table)} elements; codes are uint8[out, in / 2] with a table "
            "of 16, or int8[out, in] with none."
        )
    rows, width = codes.shape[0], codes.shape[1] * per_byte
    if group < 1 or width % group or (per_byte == 2 and group % 2):
        raise PeftError(
            f"dequantized_matmul: group is {group} of {width} inputs; it must divide them"
            f"{' and be even' if per_byte == 2 else ''}."
        )
    into, out = (rows, width) if transposed else (width, rows)
    want = {"scales": (rows, width // group), "shifts": (rows, width // group), "x": (*x.shape[:-1], into)}
    if u is not None and v is not None:
        want |= {"u": (*x.shape[:-1], u.shape[-1]), "v": (u.shape[-1], out)}
    elif u is not None or v is not None:
        raise PeftError("dequantized_matmul: u and v are one low-rank product; give both or neither.")
    for name, array in {"x": x, "scales": scales, "shifts": shifts, "u": u, "v": v}.items():
        if array is None:
            continue
        if array.shape != want[name] or not jnp.issubdtype(array.dtype, jnp.floating):
            raise PeftError(
                f"dequantized_matmul: {name} is {array.dtype}{list(array.shape)}; beside codes of "
                f"{rows} outputs and {width} inputs in groups of {group} it is floats {list(want[name])}."
            )
