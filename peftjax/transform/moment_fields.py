"""Which arrays of an optimizer's state are moments, and of which sign, by the names of the state's fields."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax

Kind = Literal["signed", "unsigned", "keep"]
Kinds = Callable[[str], Kind]
"""`'ScaleByAdamState.nu' -> kind`."""

_SIGNED = frozenset({"mu", "trace", "m", "m1", "m2", "ema", "exp_avg"})
_UNSIGNED = frozenset(
    {"nu", "nu_max", "n", "v", "v_row", "v_col", "sum_of_squares", "e_g", "e_x", "exp_avg_sq", "grad_sum_sq"}
)
# Here `v` averages differences of gradients, and `n` the squares.
_EXCEPTIONS: Mapping[str, Kind] = {"ScaleByAdanState.v": "signed"}
_SUMS = frozenset({"acc_grads", "grad_acc"})
_AROUND = frozenset({"before", "after"})
"""The fields of what a method keeps around an optimizer."""


def kind_of(field: str) -> Kind:
    """The kind of a field of a state, 'Class.field'.

    - signed: mu, trace, m, m1, m2, ema, exp_avg, and `v` of Adan;
    - unsigned, never negative: nu, nu_max, n, v, v_row, v_col, sum_of_squares, e_g, e_x, exp_avg_sq,
      grad_sum_sq;
    - keep: every other, such as copies of parameters and accumulated gradients.
    """
    if field in _EXCEPTIONS:
        return _EXCEPTIONS[field]
    name = field.rpartition(".")[2]
    return "signed" if name in _SIGNED else "unsigned" if name in _UNSIGNED else "keep"


def is_gradient_sum(field: str) -> bool:
    """Whether a field, 'Class.field', holds gradients of an unfinished window: acc_grads, grad_acc."""
    return field.rpartition(".")[2] in _SUMS


def parameter_of(path: Sequence[Any], params: Mapping[tuple[Any, ...], Any]) -> tuple[Any, ...] | None:
    """The path of the parameter that a leaf of the state mirrors: the longest that ends the leaf's path.

    In what a method keeps around an optimizer (`peftjax.transform.around`) the names of a chain's methods
    come first, then the method's own state, then path and name of the array.
    """
    return _mirrored(path, params)[0]


def field_of(state: Any, path: Sequence[Any], params: Mapping[tuple[Any, ...], Any]) -> str | None:
    """'Class.field' of the innermost named field around the tree of parameters that a leaf lies in.

    None where the leaf mirrors no parameter, or no node above it has named fields.
    """
    parameter, start = _mirrored(path, params)
    if parameter is None:
        return None
    found, node = None, state
    for key in path[:start]:
        if isinstance(key, jax.tree_util.GetAttrKey):
            found = f"{type(node).__name__}.{key.name}"
            node = getattr(node, key.name)
        elif isinstance(key, jax.tree_util.SequenceKey):
            node = node[key.idx]
        elif isinstance(key, jax.tree_util.DictKey):
            node = node[key.key]
        else:
            return found
    return found


def _mirrored(
    path: Sequence[Any], params: Mapping[tuple[Any, ...], Any]
) -> tuple[tuple[Any, ...] | None, int]:
    """The parameter, and how many keys of the leaf's path lead to the tree that mirrors the parameters."""
    for start in range(len(path) + 1):
        if (end := tuple(path[start:])) in params:
            return end, start
    around = [n for n, key in enumerate(path) if getattr(key, "name", None) in _AROUND]
    rest = path[around[-1] + 1 :] if around else ()
    for names in range(len(rest) - 1):
        if (parameter := (*rest[:names], *rest[-2:])) in params:
            return parameter, len(path) - 2
    return None, 0
