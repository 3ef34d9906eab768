"""The mathematics of one tile of the update, shared by the reference (one tile) and the kernels.

A tile is a set of inputs times a set of outputs. `rows[p]` is `[.., n, q]` and `columns[p]` `[.., q, m]`,
float32; scalars, threshold and row statistics broadcast against `[.., n, m]`. No step makes an
`[n, m, q]` array.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from peftjax.kernels.kernelized_merge.kernel_function import KernelFunction

# Squared distances below this share of |x|² + |x'|² are rounding errors of their three terms: zero.
_ROUNDING = 4 * float(jnp.finfo(jnp.float32).eps)


def centered(a: Array, b: Array, kernel_function: KernelFunction) -> tuple[Array, Array]:
    """Float32 `rows [*stack, P, n, q]` and `columns [*stack, P, q, m]` of the factors.

    A common vector is taken off both where only differences matter, so that |x|² + |x'|² - 2x·x' and
    the products of the backward pass do not cancel when the factors share a large offset.
    """
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    if kernel_function.of_distance:
        center = (jnp.mean(a, -1, keepdims=True) + jnp.mean(b, -1, keepdims=True)) / 2
        a, b = a - center, b - center
    return jnp.swapaxes(a, -1, -2), b


def product(left: Array, right: Array) -> Array:
    """The matrix product in full float32; accelerators would round its operands otherwise."""
    return jnp.matmul(left, right, precision=lax.Precision.HIGHEST, out_sharding=_of_product(left, right))


def _of_product(left: Array, right: Array) -> NamedSharding | None:
    """Under explicit axes, where a product must be told that what it sums over may be sharded."""
    sharding = jax.typeof(left).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return None
    spec = (*sharding.spec[:-1], jax.typeof(right).sharding.spec[-1])
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


def measures(rows: Sequence[Array], columns: Sequence[Array], kernel_function: KernelFunction) -> list[Array]:
    """Per head the number that the kernel is a function of: |x - x'|² or x·x', `[.., n, m]`."""
    return [_measure(x, y, kernel_function) for x, y in zip(rows, columns)]


def _measure(x: Array, y: Array, kernel_function: KernelFunction) -> Array:
    inner = product(x, y)
    if not kernel_function.of_distance:
        return inner
    squares = jnp.sum(x * x, -1, keepdims=True) + jnp.sum(y * y, -2, keepdims=True)
    distance = squares - 2.0 * inner
    return jnp.where(distance <= _ROUNDING * squares, 0.0, distance)  # NaN stays NaN


def combined(
    measured: Sequence[Array], scalars: Mapping[str, Array], kernel_function: KernelFunction
) -> Array:
    """`Σ_p coefficients[p] · kernel_p`, before mixing."""
    total = sum(
        c * _kernel(v, scalars, kernel_function) for c, v in zip(kernel_function.coefficients, measured)
    )
    if kernel_function.kernel in ("sigmoid", "rbf"):
        total = scalars["scale"] * total + sum(kernel_function.coefficients) * scalars["shift"]
    return total


def _kernel(v: Array, scalars: Mapping[str, Array], kernel_function: KernelFunction) -> Array:
    """The kernel without its scale and shift."""
    if kernel_function.kernel == "distance":
        return jnp.sqrt(v)
    if kernel_function.kernel == "linear":
        return v
    exponential = jnp.exp(-scalars["rate"] * v)
    return exponential if kernel_function.kernel == "rbf" else 1.0 / (1.0 + exponential)


class Parts(NamedTuple):
    """What a tile's gradient is made of, all `[.., n, m]`; `softmax` only of a mixed one."""

    measured: list[Array]
    combined: Array
    softmax: Array | None
    dw: Array


def parts(
    rows: Sequence[Array],
    columns: Sequence[Array],
    scalars: Mapping[str, Array],
    log_sum: Array | None,
    kernel_function: KernelFunction,
) -> Parts:
    """A tile's update dW. log_sum: of a mixed one `[.., n, 1]`, Σ_j exp(D/gamma) of whole rows as a log."""
    measured = measures(rows, columns, kernel_function)
    d = combined(measured, scalars, kernel_function)
    if not kernel_function.mixed:
        return Parts(measured, d, None, d)
    softmax = jnp.exp(d / scalars["gamma"] - log_sum)
    return Parts(measured, d, softmax, d + scalars["alpha"] * softmax + scalars["beta"])


def multiplier(dw: Array, t: Array, kernel_function: KernelFunction) -> Array:
    """What the sparsifier multiplies dW by; zero where dW is pruned."""
    if kernel_function.mode == "none":
        return jnp.ones_like(dw)
    size = jnp.abs(dw)
    if kernel_function.mode == "paper":
        return jnp.maximum(size - t, 0.0)
    return jnp.where(size > t, size if kernel_function.mode == "released" else 1.0, 0.0)


def pulled(
    g: Array,
    part: Parts,
    row_sum: Array | None,
    scalars: Mapping[str, Array],
    kernel_function: KernelFunction,
) -> tuple[list[Array], tuple[Array, ...]]:
    """The head gradients (see `slopes`) and, to be summed, those of its scalars, from g, that of dW.

    row_sum: of a mixed one `[.., n, 1]`, Σ_j g·softmax over whole rows.
    """
    if not kernel_function.mixed:
        return slopes(g, part.measured, scalars, kernel_function)
    gamma = scalars["gamma"]
    by_ratio = scalars["alpha"] * part.softmax * (g - row_sum)
    by_head, _ = slopes(g + by_ratio / gamma, part.measured, scalars, kernel_function)
    return by_head, (g * part.softmax, -by_ratio * part.combined / (gamma * gamma), g)


def slopes(
    g: Array, measured: Sequence[Array], scalars: Mapping[str, Array], kernel_function: KernelFunction
) -> tuple[list[Array], tuple[Array, ...]]:
    """Per head h, twice the gradient of |x - x'|² or that of x·x'; and, to be summed, the scalars'.

    g: the gradient of the combined kernels. The gradients of the scalars are in the order of
    `kernel_function.scalars` for `sigmoid` and `rbf`, and none otherwise.
    """
    if kernel_function.kernel == "linear":
        return [c * g for c in kernel_function.coefficients], ()
    if kernel_function.kernel == "distance":
        # The distance has no slope at zero; zero is what a pair of equal vectors gets.
        inverse = [jnp.where(v > 0, lax.rsqrt(jnp.where(v > 0, v, 1.0)), 0.0) for v in measured]
        return [c * g * i for c, i in zip(kernel_function.coefficients, inverse)], ()
    kernels = [_kernel(v, scalars, kernel_function) for v in measured]
    # d(kernel)/d(measure) = rate · change
    change = [k * (1.0 - k) if kernel_function.kernel == "sigmoid" else -k for k in kernels]
    by_scale = g * sum(c * k for c, k in zip(kernel_function.coefficients, kernels))
    by_rate = (
        g
        * scalars["scale"]
        * sum(c * v * k for c, v, k in zip(kernel_function.coefficients, measured, change))
    )
    by_shift = g * sum(kernel_function.coefficients)
    factor = (2.0 if kernel_function.of_distance else 1.0) * scalars["scale"] * scalars["rate"]
    return [c * g * factor * k for c, k in zip(kernel_function.coefficients, change)], (
        by_scale,
        by_rate,
        by_shift,
    )


def to_rows(h: Array, x: Array, y: Array, kernel_function: KernelFunction) -> Array:
    """A head's gradient of its rows, `[.., n, q]`: Σ_j h·(x - y) or Σ_j h·y."""
    along = product(h, jnp.swapaxes(y, -1, -2))
    return jnp.sum(h, -1, keepdims=True) * x - along if kernel_function.of_distance else along


def to_columns(h: Array, x: Array, y: Array, kernel_function: KernelFunction) -> Array:
    """A head's gradient of its columns, `[.., q, m]`: Σ_i h·(y - x) or Σ_i h·x."""
    along = product(jnp.swapaxes(x, -1, -2), h)
    return jnp.sum(h, -2, keepdims=True) * y - along if kernel_function.of_distance else along
