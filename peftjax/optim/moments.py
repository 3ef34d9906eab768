"""The optimizer state of chosen trained arrays, found in the state of any optax transformation by name."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import DictKey, GetAttrKey, KeyPath, SequenceKey

from peftjax.errors import PeftError

FIRST_MOMENTS = ("mu", "trace", "m")
"""Fields that are linear in the gradients."""
SECOND_MOMENTS = ("nu",)
"""Fields that are linear in their squares."""
Change = Callable[[str, Array], Array]
"""`(field, values) -> values`, the field as its transformation calls it: 'mu', 'nu', 'trace', ..."""


def change_moments(opt_state: Any, changes: dict[tuple[str, ...], Change]) -> Any:
    """The optimizer state with what belongs to some trained arrays changed.

    Optax keeps such state in trees like the trainable's: an array at `...mu[path][slot]` belongs to the
    trained array at `[path][slot]`, in whatever wrappers `mu` lies.

    Args:
        opt_state: of any transformation over a trainable made of dictionaries.
        changes: what is done, by the names that lead to the array in the trainable.
    """

    def change(path: KeyPath, leaf: Any) -> Any:
        names = _names(path)
        for start in range(len(names)):
            fn = changes.get(names[start:])
            if fn is not None:
                return fn(_field(path[: len(path) - len(names) + start]), leaf)
        return leaf

    return jax.tree_util.tree_map_with_path(change, opt_state)


def reset_moments(opt_state: Any, paths: list[tuple[str, ...]], *, first_only: bool = False) -> Any:
    """The optimizer state with the moments of some trained arrays zero; step counts go on.

    Args:
        opt_state: of any transformation over a trainable made of dictionaries.
        paths: the names that lead to each array in the trainable.
        first_only: leave second moments as they are.
    """

    def zero(field: str, values: Array) -> Array:
        return values if first_only and field not in FIRST_MOMENTS else jnp.zeros_like(values)

    return change_moments(opt_state, dict.fromkeys(paths, zero))


def rotated(turn: Array, other: Array | None = None) -> Change:
    """Moments of `Z [*stack, r, n]` after the basis of its rows turned by `turn [*stack, new r, r]`.

    First moments become `turn · m · otherᵀ`. Second ones become what they are for independent numbers,
    `turn² · v · (other²)ᵀ` with the squares of the entries: exact when basis vectors only change places.

    Args:
        turn: of the rows.
        other: of the columns, where they have a basis as well.

    Raises:
        PeftError: when called on a field that is neither.
    """

    def turned(field: str, values: Array) -> Array:
        if field in FIRST_MOMENTS:
            by = turns
        elif field in SECOND_MOMENTS:
            by = [jnp.square(one) for one in turns]
        else:
            raise PeftError(
                f"moments='rotate': the optimizer's state {field!r} cannot be turned to another basis; "
                "use moments='keep' or 'reset', or an optimizer whose moments are called "
                f"{', '.join((*FIRST_MOMENTS, *SECOND_MOMENTS))}"
            )
        product = jnp.einsum("...qr,...rn->...qn", by[0], values.astype(jnp.float32))
        for own in by[1:]:
            product = jnp.einsum("...qr,...nr->...nq", own, product)
        return product.astype(values.dtype)

    turns = [turn.astype(jnp.float32)] + ([] if other is None else [other.astype(jnp.float32)])
    return turned


def _names(path: KeyPath) -> tuple[str, ...]:
    """The dictionary keys at the end of a path."""
    names: list[str] = []
    for key in reversed(path):
        if not isinstance(key, DictKey):
            break
        names.append(key.key)
    return tuple(reversed(names))


def _field(path: KeyPath) -> str:
    """The last attribute of a path to a tree like the trainable."""
    for key in reversed(path):
        if isinstance(key, GetAttrKey):
            return key.name
        if isinstance(key, SequenceKey):
            break
    return ""
