"""Trainable rows: train the embeddings of chosen tokens, every other row bit-equal.

    E'[t] = values[i]  where t = rows[i],   E'[t] = E[t]  otherwise;   a tied output layer follows

Trained: n·dim numbers for n rows. Backward keeps nothing for lookups. This is what new special tokens
need; the whole table is neither copied nor given optimizer state.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from peftjax.core import tree
from peftjax.core.errors import PeftError
from peftjax.core.targets import Targets, require_patterns_used, select
from peftjax.transform.frozen import Frozen, Trainable
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform
from peftjax.weights.layout import layout_of
from peftjax.weights.rows import TrainedRows, rows_of


@register(
    kind="selection",
    paper="trainable rows of an embedding",
    trains="n·dim",
    backward_keeps="nothing for lookups",
    conformance=Conformance(example={"indices": [1, 3]}),
)
def rows(
    indices: Sequence[int],
    *,
    targets: Targets = r".*embedding",
    exclude: Targets | None = None,
    layouts: Mapping[str, str] | None = None,
) -> Transform:
    """Train chosen rows of the matched matrices `[rows, dim]`.

    Args:
        indices: row numbers, e.g. token ids.
        targets: as in `lora`; by default every parameter called 'embedding'.
        exclude: what to leave out, in the same forms; wins over `targets`.
        layouts: axes by pattern; the input axis ('i') is the one whose rows are meant.

    Raises:
        PeftError: here for repeated, negative or no indices; in `init` when a row lies outside a
            matrix or a target is not a matrix.
    """
    chosen = tuple(int(index) for index in indices)
    if not chosen or len(set(chosen)) < len(chosen) or min(chosen) < 0:
        raise PeftError(f"rows: give distinct, non-negative row numbers, got {list(indices)[:10]}")

    def init(key: Array, params: Any) -> tuple[Frozen, Trainable]:
        leaves = tree.named_leaves(params)
        paths = select(params, targets, caller="rows", exclude=exclude)
        require_patterns_used("rows", layouts, paths)
        plan = tuple((path, layout_of(path, leaves, layouts)) for path in paths)
        trainable = {}
        for path, layout in plan:
            if sorted(layout.letters) != ["i", "o"]:
                raise PeftError(f"rows: {path!r} has axes {layout.letters!r}; a matrix is needed")
            if max(chosen) >= layout.matrix[0]:
                raise PeftError(
                    f"rows: {path!r} has {layout.matrix[0]} rows, row {max(chosen)} is not among them"
                )
            trainable[path] = {"values": rows_of(leaves[path], layout, jnp.asarray(chosen))}
        return Frozen(params, {}, plan), trainable

    def apply(frozen: Frozen, trainable: Trainable, *, key: Array | None = None) -> Any:
        leaves = tree.named_leaves(frozen.params)
        return tree.replace(
            frozen.params,
            {
                path: TrainedRows(leaves[path], trainable[path]["values"], jnp.asarray(chosen), layout)
                for path, layout in frozen.plan
            },
        )

    return Transform("rows", {"indices": list(chosen)}, init, apply)
