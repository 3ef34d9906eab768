"""Low-rank restarts: pre-training with factored weights that are rebalanced every few hundred steps.

Paper: Glentis et al., "Scalable Parameter and Memory Efficient Pretraining for LLM: Recent Algorithmic
Advances and Benchmarking", 2025, arXiv 2505.22922; `density`: SLTrain, Han et al. 2024, arXiv 2406.02214.

    W = aᵀb + S      y = (x·aᵀ)·b + x·S              a [r, in], b [r, out], S sparse (density = 0: none)
    every T steps:   a, b = rebalance(a, b)          aᵀb unchanged, aaᵀ = bbᵀ = diag(singular values)
                     first moments of a and b = 0

Trained: a and b, r·(in + out) numbers a weight, the entries of S, and, unless `train_rest=False`, all that is
not factored. There is no dense W, neither frozen nor in a step, but one layer's where density is not 0.
Backward keeps, per weight, the layer's input x (shared) and, without S, the thin x·aᵀ. `merge` forms the
dense weights. Defaults: T = 200 is the paper's, r a quarter of the smaller side (512 of 2048 there), float32
factors; `reset="m"` is the literal reading of the paper, which has no released code.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array, lax

from peftjax.core.checks import one_of, positive, positive_share
from peftjax.core.errors import PeftError
from peftjax.core.linalg import balanced, rebalance, svd_of
from peftjax.core.targets import Targets, pattern_value
from peftjax.core.tree import named_leaves
from peftjax.methods._entries import entry_count, random_entries
from peftjax.methods._rest import with_targets, without_targets
from peftjax.methods._targets import Target, find_targets, key_for
from peftjax.methods.lowrank._factors import plain_matrices
from peftjax.transform.frozen import Frozen, Params, Trainable
from peftjax.transform.moment_fields import is_gradient_sum, kind_of
from peftjax.transform.moments import Change
from peftjax.transform.optimizer_state import OptimizerState, Slot
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Advance, Loss, Transform
from peftjax.weights.base import Weight
from peftjax.weights.canonical import to_logical
from peftjax.weights.factored import Factored
from peftjax.weights.indexing import take_entries
from peftjax.weights.sparse_entries import SparseEntries

COUNT = ".count"
RESETS: dict[str, Callable[[str], bool]] = {
    "m": lambda field: kind_of(field) == "signed",
    "m,v": lambda field: not field.endswith(COUNT),
    "m,v,count": lambda field: True,
}
STARTS = ("random", "spectral")


@register(
    kind="adapter",
    paper="low-rank restarts, Glentis et al. 2025, arXiv 2505.22922",
    trains="r·(in + out), and all that is not factored",
    backward_keeps="the input x (shared) and x·aᵀ",
    quantized_base=False,
    conformance=Conformance(example={"rank": 2, "every": 3}, starts_as_base=False),
)
def lowrank_restarts(
    *,
    rank: int | None = None,
    every: int = 200,
    start: Literal["random", "spectral"] = "random",
    reset: Literal["m", "m,v", "m,v,count"] = "m",
    density: float = 0.0,
    train_rest: bool = True,
    targets: Targets = "all-linear",
    exclude: Targets | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    layouts: Mapping[str, str] | None = None,
) -> Transform:
    """Factored weights with restarts (arXiv 2505.22922).

    Args:
        rank: r; None is a quarter of the smaller side of each weight.
        every: T, steps between two restarts; the first is before step T, counted from 0.
        start: how the factors start from the weights given.
        reset: what of the optimizer's state of a factor a restart zeroes: first moments, all moments, or
            those and the step counts, which then must belong to the arrays (`pj.optim.row_adamw`).
        density: the share of each weight's entries that are trained beside the factors.
        train_rest: train all other floating-point parameters as they are.
        targets: as in `lora`.
        exclude: as in `lora`.
        rank_pattern: as in `lora`.
        layouts: as in `lora`.

    Raises:
        PeftError: here for an option out of range; in `init` for targets or ranks that do not fit the
            parameters, or a base that is not a plain array; in a restart for `reset="m,v,count"` with an
            optimizer that has no count for each array.
    """
    positive("lowrank_restarts", "every", every)
    if density:
        positive_share("lowrank_restarts", "density", density)
    one_of("lowrank_restarts", "start", start, STARTS)
    one_of("lowrank_restarts", "reset", reset, RESETS)

    def plan_of(params: Params) -> list[Target]:
        found = find_targets(
            params, caller="lowrank_restarts", rank=1 if rank is None else rank, targets=targets,
            exclude=exclude, layers=None, layers_pattern=None, rank_pattern=rank_pattern, layouts=layouts,
        )  # fmt: skip
        if rank is not None:
            return found
        quarter = {target.path: max(1, min(target.layout.matrix) // 4) for target in found}
        return [
            dataclasses.replace(t, rank=pattern_value(t.path, rank_pattern, quarter[t.path])) for t in found
        ]

    def init(key: Array, params: Params) -> tuple[Frozen, Trainable]:
        leaves, trainable, state, plan = named_leaves(params), {}, {}, []
        for target in plan_of(params):
            path, layout, own = target.path, target.layout, key_for(key, target.path)
            w = plain_matrices("lowrank_restarts", target, leaves[path])
            a, b = _random(own, w, target.rank) if start == "random" else balanced(svd_of(w), target.rank)
            trainable[path] = {"a": a, "b": b}
            if density > 0.0:
                count = entry_count("lowrank_restarts", path, layout, target.rank, density)
                rows, columns = random_entries(jax.random.fold_in(own, 1), layout, count)
                left = to_logical(w - jnp.einsum("...rn,...rm->...nm", a, b), layout)
                trainable[path]["values"] = take_entries(left, rows, columns, layout)
                state[path] = {"rows": rows, "columns": columns}
            plan.append((path, layout, str(leaves[path].dtype)))
        rest, kept = without_targets(params, trainable, train_rest=train_rest)
        return Frozen(kept, state, tuple(plan)), trainable | rest

    def apply(frozen: Frozen, trainable: Trainable, *, key: Array | None = None) -> Params:
        weights: dict[str, Weight] = {}
        for path, layout, dtype in frozen.plan:
            slots = trainable[path]
            weights[path] = Factored(slots["a"], slots["b"], layout, dtype)
            if density > 0.0:
                places = frozen.state[path]["rows"], frozen.state[path]["columns"]
                weights[path] = SparseEntries(weights[path], slots["values"], *places, layout, added=True)
        return with_targets(frozen, trainable, weights)

    def restart(
        loss: Loss | None,
        frozen: Frozen,
        trainable: Trainable,
        optimizer: OptimizerState,
        *,
        step: Array,
        key: Array,
        part: int,
    ) -> tuple[Frozen, Trainable, OptimizerState]:
        factored = {path for path, _, _ in frozen.plan}
        new = {
            path: {**slots, **dict(zip("ab", rebalance(slots["a"], slots["b"])))}
            if path in factored
            else slots
            for path, slots in trainable.items()
        }
        turns = {
            (path, name): _gradients_turned(
                *((trainable[path][factor], new[path][factor]) for factor in (name, other))
            )
            for path in sorted(factored)
            for name, other in ("ab", "ba")
        }
        return frozen, new, _reset(optimizer, turns, reset)

    advance = Advance(lambda step: step > 0 and step % every == 0, restart)
    return Transform("lowrank_restarts", {}, init, apply, advances=(advance,))


def _random(key: Array, w: Array, rank: int) -> tuple[Array, Array]:
    """Balanced factors of a random product with the variance of each matrix."""
    *stack, n, m = w.shape
    std = jnp.sqrt(jnp.std(w, axis=(-1, -2), keepdims=True) / jnp.sqrt(rank))
    keys = jax.random.split(key)
    a, b = (jax.random.normal(k, (*stack, rank, size)) for k, size in zip(keys, (n, m)))
    return rebalance(std * a, std * b)


def _gradients_turned(own: tuple[Array, Array], other: tuple[Array, Array]) -> Change:
    """The change of accumulated gradients of a factor by a restart, for `change_moments`.

    They are products with the other factor, which became `M · other`; since the product of both factors is
    unchanged and the new ones are balanced, `M = diag(1 / singular values) · own' · ownᵀ`.

    Args:
        own: the factor `[*stack, r, n]` before and after.
        other: the other factor, likewise.
    """

    def turned(field: str, values: Array) -> Array:
        (before, after), high = (part.astype(jnp.float32) for part in own), lax.Precision.HIGHEST
        sizes = jnp.sum(jnp.square(after), axis=-1, keepdims=True)
        matrix = jnp.einsum("...rn,...qn->...rq", after, before, precision=high) / sizes
        kept = jnp.all(other[0] == other[1], axis=(-1, -2), keepdims=True)
        matrix = jnp.where(kept, jnp.eye(matrix.shape[-1]), matrix)
        return jnp.matmul(matrix, values.astype(jnp.float32), precision=high).astype(values.dtype)

    return turned


def _reset(optimizer: OptimizerState, turns: Mapping[Slot, Change], reset: str) -> OptimizerState:
    """The optimizer state without the moments that `reset` names, and accumulated gradients turned."""
    fields = set()

    def change(turned: Change) -> Change:
        def changed(field: str, values: Array) -> Array:
            fields.add(field)
            if is_gradient_sum(field):
                return turned(field, values)
            return jnp.zeros_like(values) if RESETS[reset](field) else values

        return changed

    found = optimizer.changed({slot: change(turned) for slot, turned in turns.items()})
    if reset == "m,v,count" and not any(field.endswith(COUNT) for field in fields):
        raise PeftError(
            "lowrank_restarts: reset='m,v,count' needs an optimizer whose step counts belong to the arrays; "
            "use pj.optim.row_adamw, or reset='m' or 'm,v'"
        )
    return found
