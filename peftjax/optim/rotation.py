"""What a refresh does to an optimizer's moments, which are coordinates in the basis that changes.

With T = P' Pᵀ [r, r], the new basis in terms of the old one, for moments `[*stack, r, n]`:

    'keep'      m' = m, v' = v               as GaLore is released: row i goes on as row i of the new basis
    'reset'     m' = 0, v' = 0               step counts, and so the bias correction, go on
    'rotate'    m' = T m, v' = (T ∘ T) v     what m and a diagonal v are in the new basis

With two bases the same happens on the other axis. `moment_fields` knows by the names of fields which arrays
are first and which second moments; 'rotate' refuses all else. The gradients of an unfinished window
(`optax.MultiSteps`, `optax.apply_every`) become `T g` under all three: they are added to gradients in the new
basis. The new basis is therefore one of the new gradient and this sum together (`gradient_sums`); what the
sum has outside of it is lost. Refresh between two windows where that matters.
"""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax

from peftjax.optim.bases import Side
from peftjax.optim.refresh import Projected
from peftjax.transform.moment_fields import is_gradient_sum
from peftjax.transform.moments import Change, Path, change_moments, rotated, zeroed

Moments = Literal["keep", "reset", "rotate"]
BasesOf = Mapping[str, Mapping[Side, Array]]
"""Bases by parameter and side."""


def follow_bases(
    opt_state: Any, moments: Moments, places: Mapping[str, Path], before: BasesOf, after: BasesOf
) -> Any:
    """The optimizer's state after the bases of some projected gradients changed.

    Args:
        opt_state: of any transformation.
        moments: 'keep', 'reset' or 'rotate'.
        places: the way to each projected array in what the transformation was given, by parameter.
        before: the old bases.
        after: the new ones.

    Raises:
        PeftError: 'rotate' was asked for a state that is no moment.
    """

    def change(path: str) -> Change:
        turns = [
            jnp.matmul(
                rows.astype(jnp.float32),
                jnp.matrix_transpose(before[path][side].astype(jnp.float32)),
                precision=lax.Precision.HIGHEST,
            )
            for side, rows in after[path].items()
        ]
        turned = rotated(tuple(turns), path)

        def changed(field: str, values: Array) -> Array:
            if moments == "rotate" or is_gradient_sum(field):
                return turned(field, values)
            return values if moments == "keep" else zeroed(field, values)

        return changed

    return change_moments(opt_state, {place: change(path) for path, place in places.items()})


def gradient_sums(opt_state: Any, places: Mapping[str, Path]) -> dict[str, Array]:
    """The projected gradients that a window has accumulated, by parameter; empty where there is none."""
    path_of, found = {place: path for path, place in places.items()}, {}

    def reading(place: Path) -> Change:
        def read(field: str, values: Array) -> Array:
            if is_gradient_sum(field):
                found[path_of[place]] = found.get(path_of[place], 0.0) + values
            return values

        return read

    change_moments(opt_state, {place: reading(place) for place in path_of})
    return found


def require_rotatable(
    opt_state: Any, places: Mapping[str, Path], found: Mapping[str, Projected], dtype: Any
) -> None:
    """Raise a PeftError that names the first part of a state that cannot be rotated."""
    shapes = {
        path: {
            side: jax.ShapeDtypeStruct((*own.layout.stack, own.rank, own.width(side)), dtype)
            for side in own.sides
        }
        for path, own in found.items()
    }
    jax.eval_shape(lambda s, b: follow_bases(s, "rotate", places, b, b), opt_state, shapes)
