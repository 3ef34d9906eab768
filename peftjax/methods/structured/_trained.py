"""Methods that train a model's weights themselves, in another parameterization."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from jax import Array

from peftjax.core import tree
from peftjax.methods._options import TargetOptions
from peftjax.methods._rest import with_targets, without_targets
from peftjax.methods._targets import Target, key_for
from peftjax.methods._weights import Slots
from peftjax.methods.lowrank._factors import plain_matrices
from peftjax.transform.frozen import Frozen, Params, Trainable
from peftjax.transform.transform import Advance, Transform
from peftjax.weights.base import Weight

Start = Callable[[Array, Target, Array], tuple[Slots, Slots]]
"""`(key, target, matrices [*stack, in, out] in float32) -> (trained, kept)`."""
Weigh = Callable[[Target, str, Mapping[str, Array]], Weight]
"""`(target, dtype of the array it stands for, slots) -> weight`."""


@dataclass(frozen=True, kw_only=True)
class TrainedOptions(TargetOptions):
    """Those of a method that trains the weights it takes.

    Attributes:
        train_rest: train all other floating-point parameters as they are.
    """

    train_rest: bool = True


def of_trained_weights(
    name: str,
    options: TrainedOptions,
    start: Start,
    weigh: Weigh,
    *,
    one_way: bool = False,
    advances: tuple[Advance, ...] = (),
) -> Transform:
    """The method whose targets leave the frozen parameters, and are trained as `weigh(slots)`.

    Args:
        name: the method's name.
        options: which weights it takes.
        start: the slots of a target at the beginning.
        weigh: the weight that they make.
        one_way: whether it matters which side of a weight is the input.
        advances: what the method does to itself between steps.
    """

    def init(key: Array, params: Params) -> tuple[Frozen, Trainable]:
        leaves, trainable, state, plan = tree.named_leaves(params), {}, {}, []
        for target in options.find(name, params, one_way=one_way):
            path, leaf = target.path, leaves[target.path]
            w = plain_matrices(name, target, leaf)
            trainable[path], state[path] = start(key_for(key, path), target, w)
            plan.append((target, str(leaf.dtype)))
        rest, kept = without_targets(params, trainable, train_rest=options.train_rest)
        return Frozen(kept, state, tuple(plan)), trainable | rest

    def apply(frozen: Frozen, trainable: Trainable, *, key: Array | None = None) -> Params:
        weights = {
            target.path: weigh(target, dtype, {**frozen.state[target.path], **trainable[target.path]})
            for target, dtype in frozen.plan
        }
        return with_targets(frozen, trainable, weights)

    return Transform(name, {}, init, apply, advances=advances)
