"""What the projected methods share: training in a subspace of each gradient that is refreshed every T steps.

    W_t = c·W + scale · PᵀZ        W, P fixed between two refreshes, Z trained from 0, c from 1

The gradient of Z is scale · P G, and the optimizer is given P G. No step makes or changes an array of the
size of W. Weight decay acts on Z and on c alike, so that an optimizer's decoupled decay is that of W itself.
A refresh, before steps 0, T, 2T, ..., folds c and `scale · PᵀZ` into W and takes the P of the next batch's
gradient (`_refresh.py`). With `write="step"` there is no Z or c between steps: `open` begins a step with
Z = 0 and c = 1, `close` ends it with both folded into W, matrix after matrix, in place.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import jax
import optax
from jax import Array

from peftjax.core import tree
from peftjax.core.errors import PeftError
from peftjax.methods._rest import with_targets, without_targets
from peftjax.methods.projected._matrices import (
    HELD,
    WEIGHT,
    Z,
    bases_in,
    find_matrices,
    folded,
    nothing_learned,
    start_slots,
    weight_of,
)
from peftjax.methods.projected._refresh import Loss, new_bases, with_gradients
from peftjax.optim.refresh import Compressed, Projected
from peftjax.optim.rotation import follow_bases, gradient_sums
from peftjax.transform.around import Around, Own, on_slots, require_together
from peftjax.transform.frozen import Frozen, Params, Trainable
from peftjax.transform.optimizer_state import OptimizerState
from peftjax.transform.transform import Advance, Placement, Transform

Write = Literal["refresh", "step"]
"""When Z is folded into the weights."""


def projected(
    name: str,
    options: Mapping[str, Any],
    *,
    side: Compressed,
    precondition: optax.GradientTransformation | None = None,
) -> Transform:
    """A method that trains in projected gradients, as a `Transform`.

    Args:
        name: the method's name.
        options: all of them, checked.
        side: what is compressed.
        precondition: what is done to the projected gradients, and to no other, before the optimizer.
    """
    where = {key: options[key] for key in ("rank", "targets", "exclude", "rank_pattern", "layouts")}
    scale, at_steps = float(options["scale"]), options["write"] == "step"

    def init(key: Array, params: Params) -> tuple[Frozen, Trainable]:
        plan = find_matrices(params, caller=name, side=side, **where)
        leaves = tree.named_leaves(params)
        held = {t.path: start_slots(name, key, t, leaves[t.path], options["dtype"]) for t in plan}
        trainable = {t.path: {} if at_steps else nothing_learned(t, held[t.path]) for t in plan}
        rest, left = without_targets(params, held, train_rest=options["train_rest"])
        return Frozen(left, held, tuple(plan)), trainable | rest

    def apply(frozen: Frozen, trainable: Trainable, *, key: Array | None = None) -> Params:
        weights = {t.path: weight_of(t, frozen.state[t.path], trainable[t.path], scale) for t in frozen.plan}
        return with_targets(frozen, trainable, weights)

    def open_all(frozen: Frozen, trainable: Trainable) -> tuple[Frozen, Trainable]:
        opened = {t.path: nothing_learned(t, frozen.state[t.path]) for t in frozen.plan}
        return frozen, {**opened, **{path: slots for path, slots in trainable.items() if slots}}

    def close_some(
        frozen: Frozen, trainable: Trainable, targets: tuple[Projected, ...]
    ) -> tuple[Frozen, Trainable]:
        """The state with z folded into the weights of the targets, where there is one."""
        targets = [target for target in targets if Z in trainable[target.path]]
        held = {t.path: folded(t, frozen.state[t.path], trainable[t.path], scale) for t in targets}
        left = {t.path: {} if at_steps else nothing_learned(t, held[t.path]) for t in targets}
        return replace(frozen, state={**frozen.state, **held}), {**trainable, **left}

    def close_all(frozen: Frozen, trainable: Trainable) -> tuple[Frozen, Trainable]:
        return close_some(frozen, trainable, frozen.plan)

    def refresh(
        loss: Loss,
        frozen: Frozen,
        trainable: Trainable,
        optimizer: OptimizerState,
        *,
        step: Array,
        key: Array,
        part: int,
    ) -> tuple[Frozen, Trainable, OptimizerState]:
        size = in_one(frozen)
        some = frozen.plan[part * size : (part + 1) * size]
        frozen, trainable = close_some(frozen, trainable, some)
        held = {target.path: frozen.state[target.path] for target in some}
        params = tree.replace(apply(frozen, trainable), {path: own[WEIGHT] for path, own in held.items()})
        places = {path: optimizer.place((path, Z)) for path in held}
        sums = {path: (held[path], total) for path, total in gradient_sums(optimizer.state, places).items()}
        how = {name: options[name] for name in ("basis", "iterations")}
        found = new_bases(with_gradients(loss, some, sums), params, some, held, **how, key=key)
        state = follow_bases(optimizer.state, options["moments"], places, bases_in(held), bases_in(found))
        new = {path: {**own, **found[path]} for path, own in held.items()}
        return replace(frozen, state={**frozen.state, **new}), trainable, replace(optimizer, state=state)

    def in_one(frozen: Frozen) -> int:
        return options["together"] or len(frozen.plan)

    def parts(frozen: Frozen) -> int:
        return -(-len(frozen.plan) // in_one(frozen))

    return Transform(
        name,
        options,
        init,
        apply,
        around=Around(gradients=_of_projected(name, scale, precondition, whole=at_steps)),
        advances=(Advance(lambda step: step % options["every"] == 0, refresh, HELD, parts),),
        placement=Placement(open_all, close_all, stays_closed=False) if at_steps else None,
    )


def _of_projected(
    name: str, scale: float, precondition: optax.GradientTransformation | None, *, whole: bool
) -> optax.GradientTransformationExtraArgs:
    """From the gradients of all z those with respect to P G, preconditioned.

    Args:
        name: the method's.
        scale: of the steps.
        precondition: after that, or nothing.
        whole: whether an optimizer must be given all slots of a weight, opened.
    """
    unscaled = on_slots(lambda slot, g: jax.tree.map(lambda g: g / scale, g) if slot == Z else g)
    tx = unscaled
    if precondition is not None:
        tx = optax.chain(unscaled, optax.masked(precondition, _are_z))

    def require_opened(own: Own) -> None:
        if not all(own.values()):
            raise PeftError(
                f'{name}: with write="step" begin each step, and the optimizer, with frozen, trainable = '
                "method.open(frozen, trainable), and end a step with method.close(frozen, trainable)"
            )

    def init(params: Own) -> Any:
        if whole:
            require_together(name, params)
        require_opened(params)
        return tx.init(params)

    def update(gradients: Own, state: Any, params: Any = None, **extra: Any) -> tuple[Own, Any]:
        require_opened(gradients)
        return tx.update(gradients, state, params, **extra)

    return optax.GradientTransformationExtraArgs(init, update)


def _are_z(values: Own) -> dict[str, dict[str, bool]]:
    return {path: {slot: slot == Z for slot in slots} for path, slots in values.items()}
