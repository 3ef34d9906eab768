"""What the projected methods share: training in a subspace of each gradient that is renewed every T steps.

    W_t = c·W + scale · PᵀZ        W, P fixed between two renewals, Z trained from 0, c from 1

The gradient of Z is scale · P G, and the optimizer is given P G. No array of the size of W is made or changed
by a step. Weight decay acts on Z and on c alike, so that an optimizer's decoupled decay is that of W
itself. A renewal, before steps 0, T, 2T, ..., puts `scale · PᵀZ` into W and takes the P of the next batch's
gradient (`peftjax.methods.projected._refresh`). With `write="step"` Z and c are no part of what lies between
steps: `Transform.open` begins a step with Z = 0 and c = 1, `Transform.close` ends it with both in W, matrix
after matrix, in place.
"""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, Literal

import jax
import optax
from jax import Array

from peftjax.core import tree
from peftjax.core.errors import PeftError
from peftjax.methods._rest import REST, with_targets, without_targets
from peftjax.methods.projected._matrices import (
    BASIS,
    SHRINK,
    STEERED,
    WEIGHT,
    Z,
    bases_in,
    closed,
    find_matrices,
    opened,
    settled,
    start_slots,
    weight_of,
)
from peftjax.methods.projected._refresh import Loss, new_bases, with_gradients
from peftjax.optim.refresh import Compressed
from peftjax.optim.rotation import follow_bases, gradient_sums
from peftjax.transform.transform import (
    Frozen,
    Params,
    Renewal,
    Trainable,
    Transform,
    all_slots_but,
    at_prefix,
    require_together,
)

Write = Literal["refresh", "step"]
"""When what is learned is put into the weights."""


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
        plan = find_matrices(params, who=name, side=side, **where)
        leaves = tree.named_leaves(params)
        trainable = {t.path: start_slots(name, key, t, leaves[t.path], options["dtype"]) for t in plan}
        if not at_steps:
            trainable = {path: opened(slots) for path, slots in trainable.items()}
        rest, left = without_targets(params, trainable, train_rest=options["train_rest"])
        return Frozen(left, {}, tuple(plan)), trainable | rest

    def apply(frozen: Frozen, trainable: Trainable, *, key: Array | None = None) -> Params:
        weights = {target.path: weight_of(target, trainable[target.path], scale) for target in frozen.plan}
        return with_targets(frozen, trainable, weights)

    def optimizer(
        tx: optax.GradientTransformation, prefix: tuple[str, ...] = ()
    ) -> optax.GradientTransformation:
        def unscaled(own: Mapping[str, Any]) -> dict[str, Any]:
            if any(Z not in g_of and not g_of.keys().isdisjoint(BASIS.values()) for g_of in own.values()):
                raise PeftError(
                    f'{name}: with write="step" begin a step with trainable = method.open(frozen, trainable) '
                    "and end it with trainable = method.close(frozen, trainable)"
                )
            return {
                path: {s: jax.tree.map(lambda g: g / scale, g) if s == Z else g for s, g in g_of.items()}
                for path, g_of in own.items()
            }

        def only(*names: str) -> Callable[[Any], Any]:
            def mask(params: Any) -> Any:
                nothing = jax.tree.map(lambda _: REST in names, params)
                return at_prefix(nothing, prefix, lambda own: _are_in(names, own))

            return mask

        gradient = optax.stateless(lambda updates, _: at_prefix(updates, prefix, unscaled))
        before = () if precondition is None else (optax.masked(precondition, only(Z)),)
        whole = optax.chain(gradient, *before, optax.masked(tx, only(Z, SHRINK, REST)))

        def init(params: Any) -> Any:
            return whole.init(at_prefix(params, prefix, all_opened))

        return optax.GradientTransformationExtraArgs(init, whole.update)

    def all_opened(trainable: Trainable) -> Trainable:
        if at_steps:
            require_together(name, trainable)
        return {path: opened(slots) for path, slots in trainable.items()}

    def open_all(frozen: Frozen, trainable: Trainable) -> Trainable:
        return all_opened(trainable)

    def close_all(frozen: Frozen, trainable: Trainable) -> Trainable:
        return {**trainable, **{t.path: closed(t, trainable[t.path], scale) for t in frozen.plan}}

    def run(
        loss: Loss,
        frozen: Frozen,
        trainable: Trainable,
        opt_state: Any,
        *,
        step: Array,
        key: Array,
        part: int = 0,
        prefix: tuple[str, ...] = (),
    ) -> tuple[Trainable, Any]:
        size = in_one(frozen)
        some = frozen.plan[part * size : (part + 1) * size]
        slots = {target.path: trainable[target.path] for target in some}
        if not at_steps:
            slots = {target.path: settled(target, slots[target.path], scale) for target in some}
        trainable = {**trainable, **slots}
        arrays = {path: own[WEIGHT] for path, own in slots.items()}
        params = tree.replace(apply(frozen, trainable), arrays)
        how = {name: options[name] for name in ("basis", "iterations")}
        places = {path: (*prefix, path, Z) for path in slots}
        sums = {path: {**slots[path], Z: total} for path, total in gradient_sums(opt_state, places).items()}
        found = new_bases(with_gradients(loss, some, sums), params, some, slots, **how, key=key)
        opt_state = follow_bases(opt_state, options["moments"], places, bases_in(slots), bases_in(found))
        return {**trainable, **{path: {**own, **found[path]} for path, own in slots.items()}}, opt_state

    def in_one(frozen: Frozen) -> int:
        return options["together"] or len(frozen.plan)

    def parts(frozen: Frozen) -> int:
        return -(-len(frozen.plan) // in_one(frozen))

    renewal = Renewal(lambda step: step % options["every"] == 0, run, parts)
    hooks = {"optimizer": optimizer, "renewals": (renewal,), "moving": partial(all_slots_but, STEERED)}
    if at_steps:
        hooks |= {"open": open_all, "close": close_all}
    return Transform(name, options, init, apply, **hooks)


def _are_in(names: Collection[str], trainable: Trainable) -> dict[str, dict[str, bool]]:
    return {path: {slot: slot in names for slot in slots} for path, slots in trainable.items()}
