"""What the kernels compute, tile by tile: one step of a walk over a matrix, whatever walks it.

A step takes a tile and what its outputs hold so far, and returns what they hold next.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from peftjax.kernels.kernelized_merge import selection, tile
from peftjax.kernels.kernelized_merge.kernel_function import KernelFunction

Axes = tuple[str | int, ...]  # of one matrix: "n" inputs, "m" outputs, "q" rank, "p" heads, or a size


class Tile(NamedTuple):
    """What a step sees: factors, and of what else the walk was given its part for this tile.

    valid: bool `[n, m]`, or None where the whole tile lies in the matrix; g is zero where it is not.
    """

    rows: Sequence[Array]
    columns: Sequence[Array]
    scalars: Mapping[str, Array]
    candidates: Sequence[Array]
    log_sum: Array | None
    row_sum: Array | None
    g: Array | None
    valid: Array | None


class Output(NamedTuple):
    """One array that a walk makes per matrix."""

    axes: Axes
    initial: Any = np.float32(0)


@dataclass(frozen=True)
class Pass:
    """One walk. `along`: outputs belong to a tile, or are carried along a strip of rows or columns."""

    name: str
    along: Literal["tile", "n", "m"]
    outputs: tuple[Output, ...]
    step: Callable[[Tile, Sequence[Array]], Sequence[Array]]


def update(kernel_function: KernelFunction) -> Pass:
    """The sparsified update."""
    return Pass("update", "tile", (Output(("n", "m")),), partial(_update, kernel_function))


def log_sum(kernel_function: KernelFunction) -> Pass:
    """Per row the largest D/gamma, and the sum of exp(D/gamma - largest)."""
    lowest = Output(("n", 1), np.finfo(np.float32).min)
    return Pass("log_sum", "n", (lowest, Output(("n", 1))), partial(_log_sum, kernel_function))


def row_sum(kernel_function: KernelFunction) -> Pass:
    """Per row Σ_j g·softmax, g the gradient of dW."""
    return Pass("row_sum", "n", (Output(("n", 1)),), partial(_row_sum, kernel_function))


def to_rows(kernel_function: KernelFunction) -> Pass:
    """The gradients of the rows, per head, and the rows' parts of the scalars' gradients."""
    outputs = [Output(("n", "q"))] * len(kernel_function.coefficients) + [Output(("n", 1))] * len(
        kernel_function.scalars
    )
    return Pass("to_rows", "n", tuple(outputs), partial(_to_rows, kernel_function))


def to_columns(kernel_function: KernelFunction) -> Pass:
    """The gradients of the columns, per head."""
    outputs = (Output(("q", "m")),) * len(kernel_function.coefficients)
    return Pass("to_columns", "m", outputs, partial(_to_columns, kernel_function))


def count(kernel_function: KernelFunction, candidates: int) -> Pass:
    """Per column how many |dW| lie below each candidate, and the least that does not below the last."""
    outputs = (Output((1, "m"), np.int32(0)),) * candidates + (Output((1, "m"), np.int32(selection.LARGEST)),)
    return Pass("count", "m", outputs, partial(_count, kernel_function))


def _update(kernel_function: KernelFunction, of: Tile, _: Sequence[Array]) -> list[Array]:
    dw = _parts(of, kernel_function).dw
    return [dw * tile.multiplier(dw, of.scalars["t"], kernel_function)]


def _log_sum(kernel_function: KernelFunction, of: Tile, held: Sequence[Array]) -> list[Array]:
    ratio = (
        tile.combined(tile.measures(of.rows, of.columns, kernel_function), of.scalars, kernel_function)
        / of.scalars["gamma"]
    )
    ratio = _where(of.valid, ratio, -jnp.inf)
    largest = jnp.maximum(held[0], jnp.max(ratio, 1, keepdims=True))
    added = jnp.sum(jnp.exp(ratio - largest), 1, keepdims=True)
    return [largest, held[1] * jnp.exp(held[0] - largest) + added]


def _row_sum(kernel_function: KernelFunction, of: Tile, held: Sequence[Array]) -> list[Array]:
    part = _parts(of, kernel_function)
    return [held[0] + jnp.sum(_of_update(part, of, kernel_function) * part.softmax, 1, keepdims=True)]


def _to_rows(kernel_function: KernelFunction, of: Tile, held: Sequence[Array]) -> list[Array]:
    by_head, of_scalars = _pulled(of, kernel_function)
    added = [tile.to_rows(h, x, y, kernel_function) for h, x, y in zip(by_head, of.rows, of.columns)]
    added += [jnp.sum(value, 1, keepdims=True) for value in of_scalars]
    return [old + new for old, new in zip(held, added)]


def _to_columns(kernel_function: KernelFunction, of: Tile, held: Sequence[Array]) -> list[Array]:
    by_head, _ = _pulled(of, kernel_function)
    return [
        old + tile.to_columns(h, x, y, kernel_function)
        for old, h, x, y in zip(held, by_head, of.rows, of.columns)
    ]


def _count(kernel_function: KernelFunction, of: Tile, held: Sequence[Array]) -> list[Array]:
    bits = lax.bitcast_convert_type(jnp.abs(_parts(of, kernel_function).dw), jnp.int32)
    bits = _where(of.valid, bits, selection.LARGEST)  # above every candidate
    smaller = [jnp.where(bits < candidate, 1, 0) for candidate in of.candidates]
    below = [old + jnp.sum(ones, 0, keepdims=True, dtype=jnp.int32) for old, ones in zip(held, smaller)]
    rest = jnp.where(bits < of.candidates[-1], selection.LARGEST, bits)
    return [*below, jnp.minimum(held[-1], jnp.min(rest, 0, keepdims=True))]


def _parts(of: Tile, kernel_function: KernelFunction) -> tile.Parts:
    part = tile.parts(of.rows, of.columns, of.scalars, of.log_sum, kernel_function)
    # Beyond the matrix an exponential may overflow, and meets a zero of g.
    return part._replace(softmax=_where(of.valid, part.softmax, 0.0)) if kernel_function.mixed else part


def _of_update(part: tile.Parts, of: Tile, kernel_function: KernelFunction) -> Array:
    """The gradient of dW."""
    return of.g * _where(of.valid, tile.multiplier(part.dw, of.scalars["t"], kernel_function), 0.0)


def _pulled(of: Tile, kernel_function: KernelFunction) -> tuple[list[Array], tuple[Array, ...]]:
    part = _parts(of, kernel_function)
    return tile.pulled(_of_update(part, of, kernel_function), part, of.row_sum, of.scalars, kernel_function)


def _where(valid: Array | None, value: Array, other: Any) -> Array:
    return value if valid is None else jnp.where(valid, value, other)
