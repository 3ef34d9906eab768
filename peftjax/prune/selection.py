"""Which units or entries stay: the most important ones, as many as asked, exactly.

Of n, a share s keeps `⌊s n + 1/2⌋` and at least one, a whole number keeps that many. Of equal scores the
first stay.
"""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from peftjax.core.checks import one_of, positive_share
from peftjax.core.errors import PeftError
from peftjax.weights.canonical import to_canonical, to_logical
from peftjax.weights.layout import layout_of

Keep = float | int | Array
"""A share in (0, 1], or, as an `int`, a number; a share may be traced, as that of a schedule is."""


def number_kept(keep: Keep, count: int) -> Any:
    """How many of so many stay.

    Raises:
        PeftError: a share outside (0, 1], or a number that is not from 0 to `count`.
    """
    if isinstance(keep, int):
        if not 0 <= keep <= count:
            raise PeftError(f"select: keep must be from 0 to {count}, got {keep}")
        return keep
    positive_share("select", "keep", keep)
    number = keep * count + 0.5
    if isinstance(number, jax.Array):
        return jnp.maximum(1, jnp.floor(number).astype(jnp.int32))
    return max(1, int(number))


def select(
    scores: Mapping[str, Array],
    keep: Keep | Mapping[str, Keep],
    *,
    scope: Literal["layer", "global"] = "layer",
) -> dict[str, Array]:
    """Which units of each group stay, boolean `[*stack, count]`.

    Selection per layer leaves the same number in each, so that what is left is rectangular and can be
    `sliced`.

    Args:
        scores: of `pooled`, by group; the larger the more important.
        keep: how much stays, of all groups or of each by name: a share, or a number.
        scope: "layer" compares the units of one layer (one expert) of one group, and a number is of those;
            "global" compares all that is given, and a number is of all.

    Raises:
        PeftError: `keep` is out of range or lacks a group, or is a mapping with "global".
    """
    one_of("select", "scope", scope, ("layer", "global"))
    if scope == "global":
        if isinstance(keep, Mapping):
            raise PeftError("select: one number of all is kept with scope='global'; give a share or a number")
        return _largest_of_all(scores, keep)
    return {name: largest(own, _of(keep, name)) for name, own in scores.items()}


def select_entries(
    scores: Mapping[str, Array],
    keep: Keep,
    *,
    scope: Literal["output", "matrix", "global"] = "matrix",
    layouts: Mapping[str, str] | None = None,
) -> dict[str, Array]:
    """Which entries of each weight stay, boolean in the weights' shapes.

    Args:
        scores: of `magnitude`, `wanda` and the like, by path.
        keep: a share or a number, of each output, each matrix, or all weights together.
        scope: what is compared: the inputs of one output (Wanda), one matrix, or all that is given.
        layouts: as in `lora`.

    Raises:
        PeftError: `keep` is out of range.
    """
    one_of("select_entries", "scope", scope, ("output", "matrix", "global"))
    if scope == "global":
        return _largest_of_all(scores, keep)
    found = {}
    for path, own in scores.items():
        layout = layout_of(path, scores, layouts)
        matrix = to_canonical(own, layout)
        if scope == "output":
            kept = largest(matrix.swapaxes(-1, -2), keep).swapaxes(-1, -2)
        else:
            kept = largest(matrix.reshape(*layout.stack, -1), keep).reshape(matrix.shape)
        found[path] = to_logical(kept, layout)
    return found


def select_n_of_m(
    scores: Mapping[str, Array], n: int, m: int, *, layouts: Mapping[str, str] | None = None
) -> dict[str, Array]:
    """The n largest of every m following inputs of each output, such as 2 of 4.

    Args:
        scores: as of `select_entries`.
        n: how many stay.
        m: of how many.
        layouts: as in `lora`.

    Raises:
        PeftError: n is not from 1 to m, or m does not divide a weight's inputs.
    """
    if not 1 <= n <= m:
        raise PeftError(f"select_n_of_m: n must be from 1 to m = {m}, got {n}")
    found = {}
    for path, own in scores.items():
        layout = layout_of(path, scores, layouts)
        if layout.matrix[0] % m:
            raise PeftError(
                f"select_n_of_m: m = {m} does not divide the {layout.matrix[0]} inputs of {path!r}"
            )
        by_output = to_canonical(own, layout).swapaxes(-1, -2)
        kept = largest(by_output.reshape(*by_output.shape[:-1], -1, m), n)
        found[path] = to_logical(kept.reshape(by_output.shape).swapaxes(-1, -2), layout)
    return found


def largest(scores: Array, keep: Keep) -> Array:
    """Where the largest along the last axis are, exactly as many as asked."""
    order = jnp.argsort(-scores, axis=-1, stable=True)
    return jnp.argsort(order, axis=-1, stable=True) < number_kept(keep, scores.shape[-1])


def _largest_of_all(scores: Mapping[str, Array], keep: Keep) -> dict[str, Array]:
    kept = largest(jnp.concatenate([own.reshape(-1) for own in scores.values()]), keep)
    found, start = {}, 0
    for name, own in scores.items():
        found[name] = kept[start : start + own.size].reshape(own.shape)
        start += own.size
    return found


def _of(keep: Keep | Mapping[str, Keep], name: str) -> Keep:
    if not isinstance(keep, Mapping):
        return keep
    if name not in keep:
        raise PeftError(f"select: keep names no share of the group {name!r}; give one for each")
    return keep[name]
