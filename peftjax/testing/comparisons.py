"""Comparisons of trees, by number and by bit."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peftjax.core.errors import PeftError


def assert_close(actual: Any, wanted: Any, tolerance: float = 1e-5, *, what: str = "") -> None:
    """Every pair of leaves equal to `tolerance` of the largest wanted number."""
    assert jax.tree.structure(actual) == jax.tree.structure(wanted), f"{what}: trees of another structure"
    leaves = zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(wanted))
    for (path, left), right in leaves:
        left, right = np.asarray(left, np.float64), np.asarray(right, np.float64)
        bound = tolerance * max(1.0, float(np.abs(right).max(initial=0.0)))
        said = f"{what} {jax.tree_util.keystr(path)}".strip()
        np.testing.assert_allclose(left, right, rtol=0, atol=bound, err_msg=said)


def pairs(left: Any, right: Any) -> list[tuple[str, Any, Any]]:
    """The leaves of two trees of one structure, with their paths."""
    assert jax.tree.structure(left) == jax.tree.structure(right), "trees of another structure"
    leaves = zip(jax.tree_util.tree_leaves_with_path(left), jax.tree.leaves(right))
    return [(jax.tree_util.keystr(path), ours, theirs) for (path, ours), theirs in leaves]


def numbers(values: Any) -> list[np.ndarray]:
    """Copies of the arrays, but for random keys."""
    leaves = jax.tree.leaves(values)
    return [np.array(leaf) for leaf in leaves if not jnp.issubdtype(leaf.dtype, jax.dtypes.extended)]


def same(left: Any, right: Any) -> bool:
    """Whether the numbers of two trees are equal, to the bit."""
    left, right = numbers(left), numbers(right)
    return len(left) == len(right) and all(np.array_equal(a, b, equal_nan=True) for a, b in zip(left, right))


def refusal(call: Callable[[], Any]) -> str:
    """What the PeftError says that the call has to end with."""
    try:
        call()
    except PeftError as error:
        return str(error)
    raise AssertionError("this has to be refused with a PeftError, and was not")
