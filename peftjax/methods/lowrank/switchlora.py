"""SwitchLoRA: pre-training by a LoRA whose vectors are exchanged, a few in a step, with those of two pools.

Paper: Zhou, Wang, Xu, "SwitchLoRA: Switched Low-Rank Adaptation Can Learn Full-Rank Information", 2024,
arXiv 2406.06564.

    y = x·W + s · (x·aᵀ)·b                  a [r, in], b [r, out], s = alpha / r, alpha = 1
    exchange of row i of `a` with c:        W ← W + s (a_i - c)ᵀ b_i,   pool ← a_i,   a_i ← c

and the same for `b`: the function does not change, and W takes up changes of any rank. The counterpart of a
new vector (b_i for a_i) is held for `freeze_steps` steps, with its moments and, in `pj.optim.row_adamw`, its
step count reset; the new vector keeps the moments of its row. The schedule is in `_switching.py`.
Trained: a and b, and, unless `train_rest=False`, all that is not targeted. `frozen.state` holds W, the pools
(min(in, out) - r vectors each), the remaining frozen steps of each row and the number of exchanges.
Backward keeps, per weight, the layer's input x (shared) and the thin x·aᵀ. Defaults are the released code's.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax

from peftjax.core import tree
from peftjax.core.checks import one_of
from peftjax.core.errors import PeftError
from peftjax.core.targets import Targets
from peftjax.methods._rest import with_targets, without_targets
from peftjax.methods._targets import key_for, keys_of_matrices
from peftjax.methods.lowrank._factors import ScaledTarget, find_targets, plain_matrices, residual
from peftjax.methods.lowrank._switching import (
    FACTORS,
    HELD,
    Schedule,
    Slots,
    hold_frozen_rows,
    number,
    switch,
    thawed,
)
from peftjax.optim.row_adam import zero_rows
from peftjax.transform.around import Around
from peftjax.transform.frozen import Frozen, Params, Trainable
from peftjax.transform.optimizer_state import OptimizerState
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Advance, Loss, Transform
from peftjax.weights.canonical import to_logical
from peftjax.weights.low_rank import LowRank

GAIN = (1.0 / 3.0) ** 0.5


@register(
    kind="adapter",
    paper="SwitchLoRA, Zhou et al. 2024, arXiv 2406.06564",
    trains="r·(in + out), and all that is not targeted",
    backward_keeps="the input x (shared) and x·aᵀ",
    quantized_base=False,
    replaces_base=True,
    of_steps=lambda steps: {"total_steps": steps},
    conformance=Conformance(example={"rank": 2, "total_steps": 20}),
)
def switchlora(
    *,
    total_steps: int,
    rank: int = 128,
    alpha: float = 1.0,
    interval: float = 40.0,
    decay: float = 0.1,
    freeze_steps: int = 5,
    init: Literal["switchlora", "lora"] = "switchlora",
    train_rest: bool = True,
    targets: Targets = "all-linear",
    exclude: Targets | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    layouts: Mapping[str, str] | None = None,
) -> Transform:
    """Switched low-rank pre-training (arXiv 2406.06564).

    Args:
        total_steps: optimizer steps of the training.
        rank: r, at least 2 and less than the smaller side of each weight.
        alpha: numerator of the scale.
        interval: steps between two exchanges of one vector, at first.
        decay: the share of the training after which there are 0.3 times as many exchanges as at first.
        freeze_steps: for how many steps the counterpart of a new vector is not trained.
        init: how the factors start; 'lora' is the usual start, b = 0.
        train_rest: train all other floating-point parameters as they are.
        targets: as in `lora`.
        exclude: as in `lora`.
        rank_pattern: as in `lora`.
        layouts: as in `lora`.

    Raises:
        PeftError: here for an option out of range; in `init` for targets or ranks that do not fit the
            parameters, or a base that is not a plain array.
    """
    schedule = Schedule(interval, decay, total_steps, freeze_steps)
    one_of("switchlora", "init", init, ("switchlora", "lora"))

    def start(key: Array, params: Params) -> tuple[Frozen, Trainable]:
        plan = find_targets(
            params, caller="switchlora", rank=rank, alpha=alpha, rslora=False, alpha_pattern=None,
            targets=targets, exclude=exclude, layers=None, layers_pattern=None, rank_pattern=rank_pattern,
            layouts=layouts,
        )  # fmt: skip
        leaves = tree.named_leaves(params)
        slots = {t.path: _slots(key_for(key, t.path), t, leaves[t.path], init) for t in plan}
        trainable = {path: {name: own[name] for name in FACTORS} for path, own in slots.items()}
        held = {path: {name: own[name] for name in HELD} for path, own in slots.items()}
        rest, left = without_targets(params, trainable, train_rest=train_rest)
        return Frozen(left, held, tuple(plan)), trainable | rest

    def apply(frozen: Frozen, trainable: Trainable, *, key: Array | None = None) -> Params:
        weights = {}
        for target in frozen.plan:
            base, slots = frozen.state[target.path]["weight"], trainable[target.path]
            weights[target.path] = LowRank(base, slots["a"], slots["b"], target.layout, target.scale)
        return with_targets(frozen, trainable, weights)

    def exchange(
        loss: Loss | None,
        frozen: Frozen,
        trainable: Trainable,
        optimizer: OptimizerState,
        *,
        step: Array,
        key: Array,
        part: int,
    ) -> tuple[Frozen, Trainable, OptimizerState]:
        held, trained, resets = dict(frozen.state), dict(trainable), {}
        for target in frozen.plan:
            path = target.path
            slots = thawed({**held[path], **trained[path]})
            slots, rows = _switched(schedule, target, slots, step, key_for(key, path))
            held[path], trained[path] = ({name: slots[name] for name in names} for names in (HELD, FACTORS))
            for name in FACTORS:
                resets[path, name] = zero_rows(rows[name], caller="switchlora")
        return replace(frozen, state=held), trained, optimizer.changed(resets)

    return Transform(
        "switchlora",
        {},
        start,
        apply,
        around=Around(hold_frozen_rows(), hold_frozen_rows()),
        advances=(Advance(lambda step: True, exchange, HELD),),
    )


def _slots(key: Array, target: ScaledTarget, leaf: Any, init: str) -> dict[str, Array]:
    """The slots of one weight at the start.

    Raises:
        PeftError: the base is not a plain array, or the rank leaves nothing to exchange.
    """
    plain_matrices("switchlora", target, leaf)
    (n, m), r, stack = target.layout.matrix, target.rank, target.stack
    spare = min(n, m) - r
    if r < 2 or spare < 1:
        raise PeftError(
            f"switchlora: rank {r} of {target.path!r}, {n} x {m}, leaves no vectors to exchange; "
            f"it must lie in [2, {min(n, m) - 1}], or exclude the weight"
        )
    std_a = (m**0.5 * r / n**1.5) ** 0.25 * GAIN**0.5 if init == "switchlora" else GAIN / n**0.5
    std_b = (r / (n * m) ** 0.5) ** 0.25 * GAIN**0.5 if init == "switchlora" else 0.0

    def drawn(key: Array, std: float, size: int) -> tuple[Array, Array]:
        bound = 3.0**0.5 * std
        both = bound * jax.random.uniform(key, (*stack, spare + r, size), minval=-1.0, maxval=1.0)
        return both[..., :spare, :], both[..., spare:, :]

    key_a, key_b = jax.random.split(key)
    (pool_a, a), (pool_b, b) = drawn(key_a, std_a, n), drawn(key_b, std_b, m)
    zeros = {"frozen_a": (*stack, r), "frozen_b": (*stack, r), "switched": stack}
    counters = {name: jnp.zeros(shape, jnp.int32) for name, shape in zeros.items()}
    weight = residual(leaf, a, b, target)
    return {"a": a, "b": b, "weight": weight, "pool_a": pool_a, "pool_b": pool_b, **counters}


def _switched(
    schedule: Schedule, target: ScaledTarget, slots: Slots, step: Array, key: Array
) -> tuple[dict[str, Array], dict[str, Array]]:
    """The slots of a weight after the exchanges of all its matrices, and the rows `[*stack, r]` to reset."""
    weight = slots["weight"]
    others = {name: value for name, value in slots.items() if name != "weight"}
    count, exchange = (lambda k, own: number(schedule, k, step, own)), lambda own, n: switch(schedule, own, n)
    for _ in target.stack:
        count, exchange = jax.vmap(count), jax.vmap(exchange)
    counts = count(keys_of_matrices(key, target), others)

    def some() -> tuple[dict[str, Array], dict[str, Array]]:
        done = exchange(others, counts)
        change = target.scale * jnp.einsum(
            "...kn,...km->...nm", done.left, done.right, precision=lax.Precision.HIGHEST
        )
        moved = weight.astype(jnp.float32) + to_logical(change, target.layout)
        return {**done.slots, "weight": moved.astype(weight.dtype)}, {"a": done.reset_a, "b": done.reset_b}

    def none() -> tuple[dict[str, Array], dict[str, Array]]:
        nothing = jnp.zeros(slots["frozen_a"].shape, bool)
        return dict(slots), {"a": nothing, "b": nothing}

    return lax.cond(jnp.any(counts > 0), some, none)
