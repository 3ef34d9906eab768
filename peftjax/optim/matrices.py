"""Which parameters are matrices, and along which axes, for optimizers that act on each matrix.

A parameter of any rank is read as a stack of matrices, so that every layer and every expert is a matrix of
its own, and heads or windows of convolutions belong to the inputs or the outputs (`weights/layout.py`).
"""

from collections.abc import Callable, Mapping
from typing import Any

from peftjax.core import naming, tree
from peftjax.core.errors import PeftError
from peftjax.core.targets import Targets, pattern_value, require_patterns_used, select
from peftjax.weights.layout import Layout, layout_of


def is_matrix(path: str, leaf: Any) -> bool:
    """Whether the parameter is a weight: `naming.is_weight`, and no factor of one.

    What lies below a weight's name ('.../kernel/a') is a part of an adapter. A factor has no scale of its
    own: the product of `c·b` and `a/c` is that of b and a.
    """
    *modules, name = path.split("/")
    factor = bool(modules) and modules[-1] in naming.WEIGHT_NAMES and name not in naming.WEIGHT_NAMES
    return naming.is_weight(path, leaf) and not factor


def select_matrices(
    params: Any,
    targets: Targets,
    *,
    caller: str,
    exclude: Targets | None,
    strict: bool,
    eligible: Callable[[str, Any], bool] = naming.is_weight,
) -> list[str]:
    """The paths of the targeted matrices.

    Args:
        params: the parameters.
        targets: as in `lora`.
        caller: the optimizer's name, for the errors.
        exclude: as in `lora`.
        strict: raise where 'all-linear' finds none, instead of giving none.
        eligible: `(path, leaf) -> bool`, which parameters can be meant.

    Raises:
        PeftError: as `select`, for targets that are named.
    """
    if not strict and targets == "all-linear" and exclude is None:
        try:
            return select(params, targets, caller=caller, eligible=eligible)
        except PeftError:
            return []
    return select(params, targets, caller=caller, exclude=exclude, eligible=eligible)


def matrix_layouts(params: Any, layouts: Mapping[str, str] | None, *, caller: str) -> dict[str, Layout]:
    """The layout of every parameter that holds matrices, by path.

    A channel is an output, and of an embedding `[entries, width]` an entry ('oi').

    Args:
        params: the parameters.
        layouts: axes by the end of a name, as in `lora`; letters without 'i' or without 'o' ('so': stacked
            vectors) say that the parameter holds no matrix.
        caller: the optimizer that asks, for the errors.

    Raises:
        PeftError: letters do not fit a shape, or a pattern matches no parameter.
    """
    leaves = tree.named_leaves(params)
    require_patterns_used(caller, layouts, list(leaves))
    found = {}
    for path, leaf in leaves.items():
        letters = pattern_value(path, layouts, None)
        if letters is None and is_matrix(path, leaf):
            letters = _guess(path, leaves)
        if letters is None or _names_vectors(letters, path, leaf):
            continue
        found[path] = Layout.parse(letters, leaf.shape, path)
    return found


def _guess(path: str, leaves: Mapping[str, Any]) -> str:
    shape = leaves[path].shape
    if path.rsplit("/", 1)[-1] in ("embedding", "embeddings"):
        return "s" * (len(shape) - 2) + "oi"
    return layout_of(path, leaves, None).letters


def _names_vectors(letters: str, path: str, leaf: Any) -> bool:
    vectors = not {"i", "o"} <= set(letters)
    if vectors and (len(letters) != leaf.ndim or set(letters) - set("sio")):
        raise PeftError(
            f"{path}: layout {letters!r} does not fit shape {tuple(leaf.shape)}; "
            "give one letter of 's' (stack), 'i' (input), 'o' (output) per axis"
        )
    return vectors
