"""What becomes of an optimizer's moments when the basis they are written in changes.

With T = P' Pᵀ [r, r], the new basis in terms of the old one, for moments `[*stack, r, n]`:

    'keep'      m' = m, v' = v               as GaLore is released: row i goes on as row i of the new basis
    'reset'     m' = 0, v' = 0               step counts, and so the bias correction, go on
    'rotate'    m' = T m, v' = (T ∘ T) v     what m and a diagonal v are in the new basis

With two bases the same happens on the other axis. Moments are found in any optax state as trees of the
parameters' structure; 'rotate' knows them by their field: first moments (mu, trace, ema), second moments (nu,
sum_of_squares).
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax

from peftjax.errors import PeftError
from peftjax.optim.refresh import Bases
from peftjax.tree import path_name

Moments = Literal["keep", "reset", "rotate"]
_FIRST, _SECOND = ("mu", "trace", "ema"), ("nu", "sum_of_squares")
_EXACT = lax.Precision.HIGHEST


def reset_moments(state: Any, fresh: Any, params: Any, projected: Mapping[str, Any]) -> Any:
    """`state` with what it holds of the projected parameters as in `fresh`, a state before any step."""

    def one(path: str, field: str, leaf: Any, new: Any) -> Any:
        return new

    return _map_owned(one, state, params, projected, fresh)


def rotate_moments(state: Any, params: Any, before: Mapping[str, Bases], after: Mapping[str, Bases]) -> Any:
    """`state` with the moments of the projected parameters turned from the bases `before` to `after`.

    Raises:
        PeftError: as `require_rotatable`.
    """
    require_rotatable(state, params, before)

    def one(path: str, field: str, leaf: Array) -> Array:
        turned, first_axis = leaf, True
        for side, old in before[path].items():
            new, old = after[path][side].astype(jnp.float32), old.astype(jnp.float32)
            turn = jnp.matmul(new, jnp.matrix_transpose(old), precision=_EXACT)
            turn = turn**2 if field in _SECOND else turn
            if first_axis:
                turned = jnp.matmul(turn, turned, precision=_EXACT)
            else:
                turned = jnp.matmul(turned, jnp.matrix_transpose(turn), precision=_EXACT)
            first_axis = False
        return turned.astype(leaf.dtype)

    return _map_owned(one, state, params, before)


def require_rotatable(state: Any, params: Any, projected: Mapping[str, Any]) -> None:
    """Raise a PeftError that names the first part of a state which has no known way to turn."""
    shapes = {path_name(keys): leaf.shape for keys, leaf in jax.tree_util.tree_leaves_with_path(params)}

    def one(path: str, field: str, leaf: Any) -> Any:
        if field not in (*_FIRST, *_SECOND) or jnp.shape(leaf) != shapes[path]:
            raise PeftError(
                f"project: how {field!r} of {path!r} turns into another basis is not known; "
                "set moments to 'keep' or 'reset'"
            )
        return leaf

    _map_owned(one, state, params, projected)


def _map_owned(
    fn: Callable[..., Any], state: Any, params: Any, projected: Mapping[str, Any], *rest: Any
) -> Any:
    """`state` with `fn(path, field, leaf, *rest)` for each leaf that belongs to a projected parameter.

    What a state holds of every parameter is a subtree of the parameters' own structure.
    """
    structure = jax.tree.structure(params)
    paths = [path_name(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(params)]

    def like_params(node: Any) -> bool:
        try:
            structure.flatten_up_to(node)
        except (ValueError, TypeError):
            return False
        return True

    def one(keys: tuple[Any, ...], *nodes: Any) -> Any:
        if not like_params(nodes[0]):
            return nodes[0]
        parts = zip(paths, *(structure.flatten_up_to(node) for node in nodes))
        field = path_name(keys[-1:])
        return structure.unflatten(
            jax.tree.map(partial(fn, path, field), *group) if path in projected else group[0]
            for path, *group in parts
        )

    return jax.tree_util.tree_map_with_path(one, state, *rest, is_leaf=like_params)
