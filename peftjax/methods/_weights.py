"""A method whose targets become structured weights, each made of its base and a few arrays of its own."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax import Array

from peftjax.core import tree
from peftjax.methods._options import TargetOptions
from peftjax.methods._targets import Target, all_layers, key_for, keys_of_matrices
from peftjax.transform.around import Around
from peftjax.transform.frozen import Frozen, Params, Trainable
from peftjax.transform.transform import Advance, Transform
from peftjax.weights.base import Weight

SHARED = "shared"
"""Where the arrays of the model as a whole lie, beside those of each target."""
Slots = dict[str, Array]
Start = Callable[[Array, Target, Any], tuple[Slots, Slots]]
"""`(key, target, base) -> (trained, kept)`, arrays `[*target.stack, ...]`."""
Weigh = Callable[[Target, Any, Mapping[str, Array], Array | None], Weight]
"""`(target, base, slots, keys of the matrices for dropout or None) -> weight`; a slot is `[*stack, ...]`."""
Bias = Callable[[Array, Mapping[str, Array], Target, Any], Array]
"""`(bias [*stack, out], slots, target, base) -> bias`, of the module of a target that has one."""
Share = Callable[[Array, Sequence[Target]], tuple[Slots, Slots]]
"""`(key, targets) -> (trained, kept)` of the model as a whole; the names are none of a target's slots."""
Begin = Callable[[Mapping[str, Any], Sequence[Target]], tuple[Share | None, Start]]
"""`(parameters by path, targets) -> (share, start)`."""


def of_weights(
    name: str,
    options: TargetOptions,
    start: Start | None,
    weigh: Weigh,
    *,
    begin: Begin | None = None,
    bias: Bias | None = None,
    share: Share | None = None,
    neutral: Mapping[str, float] | None = None,
    dropout: float = 0.0,
    draws: bool = False,
    one_way: bool = False,
    around: Around | None = None,
    advances: tuple[Advance, ...] = (),
) -> Transform:
    """The method that makes `weigh(base, slots)` of each target.

    Args:
        name: the method's name.
        options: which weights it takes.
        start: the slots of a target at the beginning.
        weigh: the weight; given the shared arrays among the slots.
        begin: instead of `start` and `share`, where they depend on more than a target's own weight.
        bias: what becomes of the bias of a target's module, where the method acts on what the module gives.
        share: arrays that all targets use.
        neutral: what a slot of a layer that is not chosen holds, where zeros would change the layer.
        dropout: whether `weigh` is given keys: not with a rate of 0.
        draws: whether it is given them whatever the rate.
        one_way: whether it matters which side of a weight is the input.
        around: what the method does around the optimizer.
        advances: what it does to itself before steps.
    """
    fill = neutral or {}

    def init(key: Array, params: Params) -> tuple[Frozen, Trainable]:
        plan, leaves = options.find(name, params, one_way=one_way), tree.named_leaves(params)
        trainable: dict[str, Slots] = {}
        state: dict[str, Slots] = {}
        shared, first = (share, start) if begin is None else begin(leaves, plan)
        assert first is not None
        if shared is not None:
            trainable[SHARED], state[SHARED] = shared(key_for(key, SHARED), plan)
        for target in plan:
            path = target.path
            trainable[path], state[path] = first(key_for(key, path), target, leaves[path])
        held = {path: slots for path, slots in trainable.items() if slots}
        return Frozen(params, state, tuple(plan)), held

    def apply(frozen: Frozen, trainable: Trainable, *, key: Array | None = None) -> Params:
        leaves, rewritten = tree.named_leaves(frozen.params), {}
        biases = {tree.module_of(path): path for path in tree.biases(leaves)} if bias is not None else {}
        shared = {**frozen.state.get(SHARED, {}), **trainable.get(SHARED, {})}
        for target in frozen.plan:
            own = {**frozen.state[target.path], **trainable.get(target.path, {})}
            slots = {slot: all_layers(value, target, fill.get(slot, 0.0)) for slot, value in own.items()}
            keys = keys_of_matrices(key, target) if draws or dropout > 0.0 else None
            slots = {**shared, **slots}
            rewritten[target.path] = weigh(target, leaves[target.path], slots, keys)
            if bias is not None and (of_module := biases.get(tree.module_of(target.path))) is not None:
                old = leaves[of_module]
                flat = old.reshape(*target.layout.stack, -1)
                rewritten[of_module] = (
                    bias(flat, slots, target, leaves[target.path]).astype(old.dtype).reshape(old.shape)
                )
        return tree.replace(frozen.params, rewritten)

    return Transform(name, {}, init, apply, around=around, advances=advances)
