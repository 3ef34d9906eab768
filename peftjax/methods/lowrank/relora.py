"""ReLoRA: pre-training by a LoRA that is merged into its weights and begun anew, again and again.

Paper: Lialin et al., "ReLoRA: High-Rank Training Through Low-Rank Updates", ICLR 2024, arXiv 2307.05695.

    y = x·W + s · (x·aᵀ)·b                  a [r, in], b [r, out], s = alpha / r
    every T steps:   W ← W + s · aᵀb        a ~ U(±1/√in), b = 0; of each moment of a and b all but the
                                            1 - prune largest numbers of each matrix become 0

so that the changes of W add up to a higher rank. Trained: a and b, r·(in + out) numbers a weight, and, unless
`train_rest=False`, all that is not targeted. `frozen.state` holds W. Backward keeps, per weight, the layer's
input x (shared) and the thin x·aᵀ. The learning rate is to begin anew with each restart:
`pj.optim.cosine_with_restarts`. Defaults are the released code's (r = 128, alpha = 32) and those of its run
of 1 B parameters (T = 5320, prune = 0.9).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from peftjax.core import tree
from peftjax.core.checks import positive, positive_share
from peftjax.methods._options import DropoutOptions
from peftjax.methods._rest import with_targets, without_targets
from peftjax.methods._targets import key_for, keys_of_matrices
from peftjax.methods.lowrank._factors import ScaledTarget, plain_matrices, start_uniform
from peftjax.methods.structured._options import ScaledOptions
from peftjax.transform.frozen import Frozen, Params, Trainable
from peftjax.transform.moment_fields import is_gradient_sum, kind_of
from peftjax.transform.optimizer_state import OptimizerState
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Advance, Loss, Transform
from peftjax.weights.canonical import to_logical
from peftjax.weights.low_rank import LowRank

WEIGHT = "weight"
"""The slot of W in `frozen.state`."""


@dataclass(frozen=True, kw_only=True)
class ReloraOptions(DropoutOptions, ScaledOptions):
    """Those of `relora`.

    Attributes:
        rank: r; at most the smaller side of each weight.
        alpha: numerator of the scale.
        every: T, steps between two restarts; the first is before step T, counted from 0.
        prune: which share of the numbers of each moment a restart zeroes, the smallest; 1 is all of them.
        train_rest: train all other floating-point parameters as they are.
    """

    rank: int = 128
    alpha: float = 32.0
    every: int = 5320
    prune: float = 0.9
    train_rest: bool = True

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for an option out of range."""
        super().require_valid(caller)
        positive(caller, "every", self.every)
        positive_share(caller, "prune", self.prune)


@register(
    kind="adapter",
    paper="ReLoRA, Lialin et al. 2023, arXiv 2307.05695",
    trains="r·(in + out), and all that is not targeted",
    backward_keeps="the input x (shared) and x·aᵀ",
    quantized_base=False,
    replaces_base=True,
    conformance=Conformance(example={"rank": 2, "alpha": 4.0, "every": 3}),
)
@takes(ReloraOptions)
def relora(options: ReloraOptions) -> Transform:
    """A LoRA that is merged and begun anew every T steps (arXiv 2307.05695).

    Raises:
        PeftError: here for an option out of range; in `init` for targets or ranks that do not fit the
            parameters, or a base that is not a plain array.
    """

    def init(key: Array, params: Params) -> tuple[Frozen, Trainable]:
        leaves, trainable, held, plan = tree.named_leaves(params), {}, {}, []
        for found in options.find("relora", params):
            target = ScaledTarget(**vars(found), scale=options.scale_of(found))
            plain_matrices("relora", target, leaves[target.path])
            a, b, _ = start_uniform(key_for(key, target.path), target, None)
            trainable[target.path] = {"a": a, "b": b}
            held[target.path] = {WEIGHT: leaves[target.path]}
            plan.append(target)
        rest, left = without_targets(params, trainable, train_rest=options.train_rest)
        return Frozen(left, held, tuple(plan)), trainable | rest

    def apply(frozen: Frozen, trainable: Trainable, *, key: Array | None = None) -> Params:
        dropout = options.dropout if key is not None else 0.0
        weights = {}
        for target in frozen.plan:
            slots, base = trainable[target.path], frozen.state[target.path][WEIGHT]
            keys = keys_of_matrices(key, target) if dropout > 0.0 else None
            weights[target.path] = LowRank(
                base, slots["a"], slots["b"], target.layout, target.scale, dropout, keys
            )
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
        held, trained = dict(frozen.state), dict(trainable)
        for target in frozen.plan:
            path = target.path
            held[path] = {WEIGHT: _merged(target, held[path][WEIGHT], trained[path])}
            a, b, _ = start_uniform(key_for(key, path), target, None)
            trained[path] = {"a": a, "b": b}

        def pruned(field: str, values: Array) -> Array:
            if is_gradient_sum(field):
                return jnp.zeros_like(values)  # of factors that are gone
            return values if kind_of(field) == "keep" else without_smallest(values, options.prune)

        slots = {(target.path, name): pruned for target in frozen.plan for name in "ab"}
        return replace(frozen, state=held), trained, optimizer.changed(slots)

    due = Advance(lambda step: step > 0 and step % options.every == 0, restart, (WEIGHT,))
    return Transform("relora", {}, init, apply, advances=(due,))


def without_smallest(values: Array, share: float) -> Array:
    """The matrices `[..., r, n]` with zeros where the size is at most that quantile of all sizes of each."""
    if share == 1.0:
        return jnp.zeros_like(values)
    sizes = jnp.abs(values.astype(jnp.float32))
    least = jnp.quantile(sizes, share, axis=(-1, -2), keepdims=True)
    return jnp.where(sizes > least, values, jnp.zeros_like(values))


def _merged(target: ScaledTarget, weight: Any, slots: Mapping[str, Array]) -> Array:
    change = jnp.einsum("...ri,...ro->...io", slots["a"], slots["b"], precision=lax.Precision.HIGHEST)
    moved = weight.astype(jnp.float32) + to_logical(target.scale * change, target.layout)
    return moved.astype(weight.dtype)
