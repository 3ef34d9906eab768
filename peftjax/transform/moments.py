"""The optimizer state of chosen trained arrays, found by name in that of any optax transformation."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.tree_util import DictKey

from peftjax.core.errors import PeftError
from peftjax.quantize.blockwise import BlockwiseCodes, encode_like
from peftjax.transform.moment_fields import field_of, is_gradient_sum, kind_of, parameter_of

Path = tuple[Any, ...]
"""The way to an array in the trainable: names of dictionaries, or keys of jax's."""
Change = Callable[[str, Array], Array]
"""`(field, values) -> values`, the field as 'ScaleByAdamState.mu'."""


def change_moments(opt_state: Any, changes: Mapping[Path, Change]) -> Any:
    """The optimizer state with what belongs to some trained arrays changed.

    Optax keeps such state in trees like the trainable's: an array at `...mu[path][slot]` belongs to the
    trained array at `[path][slot]`, in whatever wrappers `mu` lies. Moments in eight bits are decoded,
    changed and encoded, unless the change returns them as they are.

    Args:
        opt_state: of any transformation over the trainable.
        changes: what is done, by the end of the way to the array in the trainable.
    """
    wanted = {
        tuple(DictKey(k) if isinstance(k, str) else k for k in path): fn for path, fn in changes.items()
    }

    def change(path: Path, leaf: Any) -> Any:
        owner = parameter_of(path, wanted)
        if not owner:
            return leaf
        field = field_of(opt_state, path, wanted) or ""
        if isinstance(leaf, BlockwiseCodes):
            values = leaf.decode()
            changed = wanted[owner](field, values)
            return leaf if changed is values else encode_like(changed, leaf)
        return wanted[owner](field, leaf)

    return jax.tree_util.tree_map_with_path(
        change, opt_state, is_leaf=lambda node: isinstance(node, BlockwiseCodes)
    )


def zeroed(field: str, values: Array) -> Array:
    """All zero: the change that resets."""
    return jnp.zeros_like(values)


def rotated(turns: tuple[Array, ...], name: str) -> Change:
    """Moments of `R [*stack, r, n]` in a new basis, one change of basis T for its rows, one for its columns.

    First moments and sums of gradients become `T m`, second moments `(T ∘ T) v`; with a second T' from the
    right, `T m T'ᵀ`.

    Args:
        turns: T `[*stack, new r, r]`, and T' where the columns have a basis too.
        name: of the array, for the error.

    Raises:
        PeftError: when called on what is no moment of the array's shape.
    """

    def turned(field: str, values: Array) -> Array:
        kind = "signed" if is_gradient_sum(field) else kind_of(field)
        if kind == "keep" or values.ndim != turns[0].ndim or values.shape[-2] != turns[0].shape[-1]:
            raise PeftError(
                f"moments='rotate': how {field.rpartition('.')[2]!r} of {name!r} turns into another basis "
                "is not known; set moments to 'keep' or 'reset'"
            )
        wide = [jnp.square(t) if kind == "unsigned" else t for t in (t.astype(jnp.float32) for t in turns)]
        found = jnp.matmul(wide[0], values.astype(jnp.float32), precision=lax.Precision.HIGHEST)
        for own in wide[1:]:
            found = jnp.matmul(found, jnp.matrix_transpose(own), precision=lax.Precision.HIGHEST)
        return found.astype(values.dtype)

    return turned
