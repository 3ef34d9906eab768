"""The operations as walks over tiles: of a whole matrix only the result is stored, no distances or mask."""

from collections.abc import Callable, Mapping
from math import prod

import jax.numpy as jnp
from jax import Array

from peftjax.kernels.kernelized_merge import passes, selection, tile
from peftjax.kernels.kernelized_merge.kernel_function import KernelFunction

Run = Callable[..., list[Array]]  # `gpu.run` or `tpu.run`
_BITS_PER_PASS = 3  # 7 candidates and 11 passes


def forward(
    run: Run, a: Array, b: Array, scalars: Mapping[str, Array], t: Array, kernel_function: KernelFunction
) -> Array:
    """`reference.forward` with kernels."""
    given, names = _given(run, a, b, {**scalars, "t": t}, kernel_function)
    (dw,) = run(passes.update(kernel_function), given, names)
    return dw.reshape(*t.shape, *dw.shape[1:])


def backward(
    run: Run,
    a: Array,
    b: Array,
    scalars: Mapping[str, Array],
    t: Array,
    g: Array,
    kernel_function: KernelFunction,
) -> tuple[Array, Array, dict[str, Array]]:
    """`reference.backward` with kernels."""
    given, names = _given(run, a, b, {**scalars, "t": t}, kernel_function)
    given["g"] = g.reshape(-1, *g.shape[-2:])
    if kernel_function.mixed:
        (given["row_sum"],) = run(passes.row_sum(kernel_function), given, names)
    heads = len(kernel_function.coefficients)
    made = run(passes.to_rows(kernel_function), given, names)
    of_rows = jnp.swapaxes(jnp.stack(made[:heads], 1), -1, -2)
    of_columns = jnp.stack(run(passes.to_columns(kernel_function), given, names), 1)
    sums = {
        name: jnp.sum(rows, (1, 2)).reshape(t.shape)
        for name, rows in zip(kernel_function.scalars, made[heads:])
    }
    return of_rows.reshape(a.shape), of_columns.reshape(b.shape), sums


def threshold(
    run: Run, a: Array, b: Array, scalars: Mapping[str, Array], level: Array, kernel_function: KernelFunction
) -> Array:
    """`reference.threshold` with kernels: |dW| is recomputed in every pass, and never stored."""
    given, names = _given(run, a, b, scalars, kernel_function)

    def count(candidates: Array) -> selection.Counted:
        number = candidates.shape[-1]
        asked = {**given, "candidates": candidates.reshape(-1, 1, number)}
        *below, least = run(passes.count(kernel_function, number), asked, names)
        below = jnp.stack([jnp.sum(columns, (1, 2)) for columns in below], -1)
        return selection.Counted(
            below.reshape(candidates.shape), jnp.min(least, (1, 2)).reshape(candidates.shape[:-1])
        )

    return selection.quantile(count, level, a.shape[-1] * b.shape[-1], kernel_function, _BITS_PER_PASS)


def _given(
    run: Run, a: Array, b: Array, scalars: Mapping[str, Array], kernel_function: KernelFunction
) -> tuple[dict[str, Array], tuple[str, ...]]:
    """What every walk is given, the stack as one axis of matrices, and the scalars' names."""
    matrices = prod(a.shape[:-3])
    rows, columns = (
        factor.reshape(matrices, *factor.shape[-3:]) for factor in tile.centered(a, b, kernel_function)
    )
    given = {"rows": rows, "columns": columns}
    if scalars:
        packed = jnp.stack([value.astype(jnp.float32) for value in scalars.values()], -1)
        given["scalars"] = packed.reshape(matrices, 1, len(scalars))
    names = tuple(scalars)
    if kernel_function.mixed:
        largest, total = run(passes.log_sum(kernel_function), given, names)
        given["log_sum"] = largest + jnp.log(total)
    return given, names
