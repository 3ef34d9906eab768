"""The update and its closed-form gradient in jnp: a matrix is one tile, and XLA may partition it."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array, lax

from peftjax.kernels.kernelized_merge import selection, tile
from peftjax.kernels.kernelized_merge.kernel_function import KernelFunction


def forward(
    a: Array, b: Array, scalars: Mapping[str, Array], t: Array, kernel_function: KernelFunction
) -> Array:
    """The sparsified update, float32 `[*stack, n, m]`."""
    *_, part = _whole(a, b, scalars, kernel_function)
    return part.dw * _factor(part.dw, t, kernel_function)


def backward(
    a: Array, b: Array, scalars: Mapping[str, Array], t: Array, g: Array, kernel_function: KernelFunction
) -> tuple[Array, Array, dict[str, Array]]:
    """The gradients of a, b and the scalars, float32, from g, that of the sparsified update."""
    rows, columns, spread, part = _whole(a, b, scalars, kernel_function)
    g = g * _factor(part.dw, t, kernel_function)
    row_sum = jnp.sum(g * part.softmax, -1, keepdims=True) if kernel_function.mixed else None
    by_head, of_scalars = tile.pulled(g, part, row_sum, spread, kernel_function)
    of_rows = [tile.to_rows(h, x, y, kernel_function) for h, x, y in zip(by_head, rows, columns)]
    of_columns = [tile.to_columns(h, x, y, kernel_function) for h, x, y in zip(by_head, rows, columns)]
    sums = {name: jnp.sum(value, (-2, -1)) for name, value in zip(kernel_function.scalars, of_scalars)}
    return jnp.swapaxes(jnp.stack(of_rows, -3), -1, -2), jnp.stack(of_columns, -3), sums


def threshold(
    a: Array, b: Array, scalars: Mapping[str, Array], level: Array, kernel_function: KernelFunction
) -> Array:
    """The threshold by counts over |dW|, which is stored once."""
    dw = _whole(a, b, scalars, kernel_function)[-1].dw
    return selection.quantile(
        selection.counter(jnp.abs(dw)), level, dw.shape[-2] * dw.shape[-1], kernel_function
    )


def _whole(
    a: Array, b: Array, scalars: Mapping[str, Array], kernel_function: KernelFunction
) -> tuple[list[Array], list[Array], dict[str, Array], tile.Parts]:
    """Rows and columns per head, the scalars as they broadcast, and the matrix as one tile."""
    rows, columns = tile.centered(a, b, kernel_function)
    heads = range(a.shape[-3])
    rows, columns = [rows[..., p, :, :] for p in heads], [columns[..., p, :, :] for p in heads]
    spread = {name: _spread(value) for name, value in scalars.items()}
    log_sum = None
    if kernel_function.mixed:
        d = tile.combined(tile.measures(rows, columns, kernel_function), spread, kernel_function)
        log_sum = jax.nn.logsumexp(d / spread["gamma"], axis=-1, keepdims=True)
    return rows, columns, spread, tile.parts(rows, columns, spread, log_sum, kernel_function)


def _factor(dw: Array, t: Array, kernel_function: KernelFunction) -> Array:
    """The sparsifier's multiplier, a constant of every derivative."""
    return tile.multiplier(*lax.stop_gradient((dw, _spread(t))), kernel_function)


def _spread(value: Array) -> Array:
    return value.astype(jnp.float32)[..., None, None]
