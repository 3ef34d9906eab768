"""The update and its closed-form gradient in jnp: a matrix is one tile, and XLA may partition it."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from peftjax.kernels.kernelised_merge import tile
from peftjax.kernels.kernelised_merge.map import Map


def forward(a: Array, b: Array, scalars: Mapping[str, Array], t: Array, map: Map) -> Array:
    """The sparsified update, float32 `[*stack, n, m]`."""
    rows, columns = _heads(a, b, map)
    scalars = {name: _spread(value) for name, value in scalars.items()}
    d = tile.combined(tile.measures(rows, columns, map), scalars, map)
    if map.mixed:
        d = tile.mixed(d, _log_sum(d, scalars), scalars)
    return d * tile.multiplier(d, _spread(t), map)


def backward(
    a: Array, b: Array, scalars: Mapping[str, Array], t: Array, g: Array, map: Map
) -> tuple[Array, Array, dict[str, Array]]:
    """The gradients of a, b and the scalars, float32, from g, that of the sparsified update."""
    rows, columns = _heads(a, b, map)
    spread = {name: _spread(value) for name, value in scalars.items()}
    measured = tile.measures(rows, columns, map)
    d = tile.combined(measured, spread, map)
    of_scalars = ()
    if map.mixed:
        log_sum = _log_sum(d, spread)
        g = g * tile.multiplier(tile.mixed(d, log_sum, spread), _spread(t), map)
        s = jnp.exp(d / spread["gamma"] - log_sum)
        row_sum = jnp.sum(g * s, -1, keepdims=True)
        of_alpha, of_beta = g * s, g
        g, of_gamma = tile.unmixed(g, d, s, row_sum, spread)
        of_scalars = (of_alpha, of_gamma, of_beta)
    else:
        g = g * tile.multiplier(d, _spread(t), map)
    by_head, of_kernel = tile.slopes(g, measured, spread, map)
    of_rows = [tile.to_rows(h, x, y, map) for h, x, y in zip(by_head, rows, columns)]
    of_columns = [tile.to_columns(h, x, y, map) for h, x, y in zip(by_head, rows, columns)]
    sums = {k: jnp.sum(v, (-2, -1)) for k, v in zip(map.scalars, of_scalars or of_kernel)}
    return jnp.swapaxes(jnp.stack(of_rows, -3), -1, -2), jnp.stack(of_columns, -3), sums


def _heads(a: Array, b: Array, map: Map) -> tuple[list[Array], list[Array]]:
    rows, columns = tile.centred(a, b, map)
    heads = range(a.shape[-3])
    return [rows[..., p, :, :] for p in heads], [columns[..., p, :, :] for p in heads]


def _log_sum(d: Array, scalars: Mapping[str, Array]) -> Array:
    return jax.nn.logsumexp(d / scalars["gamma"], axis=-1, keepdims=True)


def _spread(value: Array) -> Array:
    return value.astype(jnp.float32)[..., None, None]
