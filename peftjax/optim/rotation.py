"""What becomes of an optimizer's moments when the basis they are written in changes.

With T = P' Pᵀ [r, r], the new basis in terms of the old one, for moments `[*stack, r, n]`:

    'keep'      m' = m, v' = v               as GaLore is released: row i goes on as row i of the new basis
    'reset'     m' = 0, v' = 0               step counts, and so the bias correction, go on
    'rotate'    m' = T m, v' = (T ∘ T) v     what m and a diagonal v are in the new basis

With two bases the same happens on the other axis. Which arrays are first and which second moments their
fields say (`moment_fields`); 'rotate' refuses all that is neither.
"""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax

from peftjax.optim.bases import Side
from peftjax.optim.moments import Change, Path, change_moments, rotated, zeroed
from peftjax.optim.refresh import Projected

Moments = Literal["keep", "reset", "rotate"]
BasesOf = Mapping[str, Mapping[Side, Array]]
"""Bases by parameter and side."""


def follow_bases(
    opt_state: Any, moments: Moments, places: Mapping[str, Path], before: BasesOf, after: BasesOf
) -> Any:
    """The optimizer's state after the bases of some projected gradients changed.

    Args:
        opt_state: of any transformation.
        moments: what becomes of them.
        places: the way to each projected array in what the transformation was given, by parameter.
        before: the old bases.
        after: the new ones.

    Raises:
        PeftError: 'rotate' was asked for a state that is no moment.
    """
    if moments == "keep":
        return opt_state

    def change(path: str) -> Change:
        if moments == "reset":
            return zeroed
        turns = [
            jnp.matmul(
                rows.astype(jnp.float32),
                jnp.matrix_transpose(before[path][side].astype(jnp.float32)),
                precision=lax.Precision.HIGHEST,
            )
            for side, rows in after[path].items()
        ]
        return rotated(tuple(turns), path)

    return change_moments(opt_state, {place: change(path) for path, place in places.items()})


def require_rotatable(
    opt_state: Any, places: Mapping[str, Path], found: Mapping[str, Projected], dtype: Any
) -> None:
    """Raise a PeftError that names the first part of a state which has no known way to turn."""
    shapes = {
        path: {
            side: jax.ShapeDtypeStruct((*own.layout.stack, own.rank, own.width(side)), dtype)
            for side in own.sides
        }
        for path, own in found.items()
    }
    jax.eval_shape(lambda s, b: follow_bases(s, "rotate", places, b, b), opt_state, shapes)
