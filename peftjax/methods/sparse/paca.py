"""PaCA: train some rows of the input side of each weight, in the weight itself.

Paper: Woo et al., "PaCA: Partial Connection Adaptation for Efficient Fine-Tuning", ICLR 2025, arXiv
2503.01905.

    W'[I] = s · θ,  W' = W elsewhere      I [r] rows (inputs), θ [r, out], s = alpha / r, first θ = W[I] / s
    y = x·W + x[I]·(s·θ − W[I])           dθ = s · x[I]ᵀ·g,   dx = g·W'ᵀ

Trained: θ, r·out numbers a weight. Backward keeps, per adapted layer, x[I], r numbers a token: never x,
never W', never dW; dθ is summed in float32. (x stays where another operation keeps it: flash attention
keeps its output, a gated activation its factors.) With `in_place`, the base holds W' and forward is
x·W' alone. Defaults: r = 8, alpha = 8 are the released code's. Weight decay pulls the pre-trained rows
themselves towards zero: use none, as the authors do.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from peftjax.core import tree
from peftjax.core.checks import one_of, positive
from peftjax.core.errors import PeftError
from peftjax.core.targets import Targets, pattern_value, require_patterns_used
from peftjax.methods._targets import key_for
from peftjax.methods.sparse._in_place import Place, Plan, Slots, find_weights, in_the_base
from peftjax.transform.frozen import Frozen, Trainable
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform
from peftjax.weights.indexing import put_rows
from peftjax.weights.layout import Layout
from peftjax.weights.rows import TrainedRows, rows_of


@register(
    kind="adapter",
    paper="PaCA, Woo et al. 2025, arXiv 2503.01905",
    trains="r·out",
    backward_keeps="x[I], r numbers a token",
    conformance=Conformance(example={"rank": 2, "alpha": 4.0}),
)
def paca(
    *,
    rank: int = 8,
    alpha: float = 8.0,
    targets: Targets = "all-linear",
    exclude: Targets | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    layouts: Mapping[str, str] | None = None,
    selection: str | Mapping[str, Sequence[Any]] = "random",
    in_place: bool = False,
) -> Transform:
    """Partial connection adaptation of the targeted weights (arXiv 2503.01905).

    Args:
        rank: r, rows trained of each matrix; at most its inputs.
        alpha: numerator of s.
        targets: as in `lora`.
        exclude: what to leave out, in the same forms; wins over `targets`.
        rank_pattern: rank by pattern.
        alpha_pattern: alpha by pattern.
        layouts: axes by pattern.
        selection: 'random', drawn for every matrix from the key and the weight's name; or row numbers by
            pattern, for a stack `[*stack, r]` nested lists. A weight that no pattern matches draws.
        in_place: the base may hold the adapted weights; see `Transform.close`.

    Raises:
        PeftError: here for an option out of range; in `init` for targets, ranks or rows that do not fit.
    """
    positive("paca", "rank", rank)
    positive("paca", "alpha", alpha)
    if isinstance(selection, str):
        one_of("paca", "selection", selection, ("random",))
    given = {} if isinstance(selection, str) else {p: _numbers(rows) for p, rows in selection.items()}
    config = {"selection": {p: rows.tolist() for p, rows in given.items()} or selection}

    def init(key: Array, params: Any) -> tuple[Frozen, Trainable]:
        found = find_weights(
            params,
            caller="paca",
            targets=targets,
            exclude=exclude,
            layouts=layouts,
            in_place=in_place,
            one_way=True,
        )
        for patterns in (rank_pattern, alpha_pattern, given):
            require_patterns_used("paca", patterns, list(found))
        leaves, places, state, trainable = tree.named_leaves(params), [], {}, {}
        for path, layout in found.items():
            r = pattern_value(path, rank_pattern, rank)
            rows = _rows(key_for(key, path), path, layout, r, pattern_value(path, given, None))
            own = pattern_value(path, alpha_pattern, alpha) / rows.shape[-1]
            place = Place(path, layout, rows.shape[-1], own)
            original = rows_of(leaves[path], layout, rows)
            places.append(place)
            state[path] = {"rows": rows}
            if in_place:
                state[path]["original"] = original.astype(leaves[path].dtype)
            trainable[path] = {"values": original / place.scale}
        return Frozen(params, state, Plan(tuple(places))), trainable

    def apply(frozen: Frozen, trainable: Trainable, *, key: Array | None = None) -> Any:
        leaves, plan = tree.named_leaves(frozen.params), frozen.plan
        return tree.replace(
            frozen.params,
            {
                place.path: TrainedRows(
                    leaves[place.path],
                    trainable[place.path]["values"],
                    frozen.state[place.path]["rows"],
                    place.layout,
                    place.scale,
                    plan.closed,
                )
                for place in plan.places
            },
        )

    return Transform("paca", config, init, apply, placement=in_the_base(_put) if in_place else None)


def _put(w: Array, place: Place, kept: Slots, trained: Slots | None) -> Array:
    values = kept["original"] if trained is None else place.scale * trained["values"]
    return put_rows(w, kept["rows"], values, place.layout)


def _rows(key: Array, path: str, layout: Layout, rank: int, given: np.ndarray | None) -> Array:
    """Rows `[*stack, r]` int32, ascending; those given, or the first r of a random permutation."""
    n_in = layout.matrix[0]
    if given is not None:
        rows = np.sort(given, axis=-1)
        fits = rows.ndim == len(layout.stack) + 1 and rows.shape[:-1] == layout.stack and rows.size
        if not fits or not np.issubdtype(rows.dtype, np.integer):
            raise PeftError(
                f"paca: the rows given for {path!r} have shape {rows.shape}; give integers "
                f"{[*layout.stack, 'r']}, row numbers for each matrix"
            )
        if rows.min() < 0 or rows.max() >= n_in or (np.diff(rows, axis=-1) == 0).any():
            raise PeftError(
                f"paca: the rows given for {path!r} are not distinct numbers from 0 to {n_in - 1}"
            )
        return jnp.asarray(rows, jnp.int32)
    if not 1 <= rank <= n_in:
        raise PeftError(
            f"paca: rank {rank} does not fit {path!r}, which has {n_in} inputs; set rank or rank_pattern"
        )

    def draw(key: Array) -> Array:
        return jnp.sort(jax.random.permutation(key, n_in)[:rank]).astype(jnp.int32)

    for _ in layout.stack:
        draw = jax.vmap(draw)
    return draw(jax.random.split(key, layout.stack) if layout.stack else key)


def _numbers(rows: Any) -> np.ndarray:
    """The rows as an array; nothing for what is none, which fits no weight."""
    try:
        found = np.asarray(rows)
    except ValueError:  # lists of different lengths
        return np.empty(0)
    return np.empty(0) if found.dtype == object else found
