"""LoRA: train a rank-r product beside each frozen weight.

Paper: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, arXiv 2106.09685.

    y = x·W + s · (x·aᵀ)·b        a [r, in], b [r, out], s = alpha / r   (rsLoRA: alpha / √r)

Trained: a and b, r·(in + out) numbers a weight; biases on request. Backward keeps, per adapted layer,
the layer's input x once (shared with its neighbors) and the thin x·aᵀ; never a merged weight, never a
full gradient.

Start: a ~ U(-1/√in, 1/√in), b = 0, as the authors' code does (the paper says Gaussian: `init=
"gaussian"`, N(0, 1/r²)); lookup tables start with a = 0, b ~ N(0, 1), and with
`init="zero_a"` all do so, b uniform. Defaults r = 8, alpha = 16 (s = 2) are those of common practice, not of
the paper. Convolutions with groups share `a` among the groups, so that
they merge exactly; the usual PyTorch library trains an ungrouped `a` there and cannot merge.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from peftjax.core import tree
from peftjax.core.errors import PeftError
from peftjax.core.naming import is_embedding
from peftjax.methods._targets import Target, all_layers, key_for, keys_of_matrices
from peftjax.methods.lowrank._factors import Bias, Start, find_targets
from peftjax.methods.lowrank._options import LoraOptions, LowRankOptions
from peftjax.transform.around import Around
from peftjax.transform.frozen import Frozen, Trainable
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform
from peftjax.weights.base import Weight
from peftjax.weights.low_rank import LowRank
from peftjax.weights.shifted import Shifted

SHIFT = "shift"
"""The slot of a bias that the method adds to a layer."""


@dataclass(frozen=True)
class Wrap:
    """What a method puts around a low-rank weight.

    Attributes:
        apply: `(target, low-rank weight, its slots) -> weight`.
        init: `(key, target, base) -> (trained slots, frozen slots)` of one target, beside the factors.
    """

    apply: Callable[[Target, LowRank, Mapping[str, Array]], Weight]
    init: Callable[[Array, Target, Any], tuple[dict[str, Array], dict[str, Array]]] = (
        lambda key, target, base: ({}, {})
    )


@register(
    kind="adapter",
    paper="LoRA, Hu et al. 2022, arXiv 2106.09685",
    trains="r·(in + out)",
    backward_keeps="the input x (shared) and x·aᵀ",
    conformance=Conformance(example={"rank": 2, "alpha": 4.0}),
)
@takes(LoraOptions)
def lora(options: LoraOptions) -> Transform:
    """Low-rank adaptation of the targeted weights (arXiv 2106.09685).

    Raises:
        PeftError: here for an option out of range; in `init` for targets, ranks or layers that do not
            fit the parameters.
    """
    return low_rank("lora", options, options.start, rslora=options.rslora)


def low_rank(
    name: str,
    options: LowRankOptions,
    start: Start,
    *,
    rslora: bool,
    wrap: Wrap | None = None,
    trained: tuple[str, ...] = ("a", "b"),
    one_way: bool = False,
    draws: bool = False,
    around: Around | None = None,
) -> Transform:
    """A method whose weights are `base + scale · aᵀb`, as a `Transform`.

    Args:
        name: the method's name.
        options: those of the method.
        start: the factors and base at the beginning.
        rslora: scale by alpha / sqrt(r), not alpha / r.
        wrap: what is put around each low-rank weight, with its own slots.
        trained: the factors that are; with `a` frozen the backward pass needs no input x, with `b` frozen
            no `x·aᵀ`.
        one_way: whether the method depends on which side of a weight is the input.
        draws: whether each weight is given its key also without dropout.
        around: what the method does around the optimizer.
    """
    dropout, bias = options.dropout, options.bias

    def init(key: Array, params: Any) -> tuple[Frozen, Trainable]:
        plan = find_targets(
            params, caller=name, rank=options.rank, alpha=options.alpha, targets=options.targets,
            exclude=options.exclude, layers=options.layers, layers_pattern=options.layers_pattern,
            rank_pattern=options.rank_pattern, alpha_pattern=options.alpha_pattern,
            layouts=options.layouts, rslora=rslora, one_way=one_way,
        )  # fmt: skip
        leaves = tree.named_leaves(params)
        trainable: dict[str, dict[str, Array]] = {}
        state: dict[str, dict[str, Array]] = {}
        bases: dict[str, Any] = {}
        for target in plan:
            a, b, bases[target.path] = start(key_for(key, target.path), target, leaves[target.path])
            both = {"a": a, "b": b}
            trainable[target.path] = {name: both.pop(name) for name in trained}
            state[target.path] = both
            if bias == "added" and _lacks_bias(target, leaves):
                trainable[target.path][SHIFT] = jnp.zeros((*target.stack, target.layout.matrix[1]))
            if wrap is not None:
                own_key = jax.random.fold_in(key_for(key, target.path), 1)
                slots, kept = wrap.init(own_key, target, bases[target.path])
                trainable[target.path] |= slots
                state[target.path] |= kept
        biases, rest = tree.partition(tree.replace(params, bases), _biases(name, params, plan, bias))
        trainable |= {path: {"value": value} for path, value in biases.items()}
        return Frozen(rest, state, tuple(plan)), trainable

    def apply(frozen: Frozen, trainable: Trainable, *, key: Array | None = None) -> Any:
        adapted = {target.path for target in frozen.plan}
        taken = {path: slot["value"] for path, slot in trainable.items() if path not in adapted}
        params = tree.join(frozen.params, taken) if taken else frozen.params
        leaves = tree.named_leaves(params)
        rewritten: dict[str, Weight] = {}
        for target in frozen.plan:
            slots = {**frozen.state[target.path], **trainable[target.path]}
            weight = LowRank(
                leaves[target.path],
                all_layers(slots["a"], target),
                all_layers(slots["b"], target),
                target.layout,
                target.scale,
                dropout if key is not None else 0.0,
                keys_of_matrices(key, target) if draws or dropout > 0.0 else None,
            )
            weight = weight if wrap is None else wrap.apply(target, weight, slots)
            if SHIFT in slots:
                weight = Shifted(weight, all_layers(slots[SHIFT], target), target.layout)
            rewritten[target.path] = weight
        return tree.replace(params, rewritten)

    return Transform(name, {}, init, apply, around=around)


def _lacks_bias(target: Target, leaves: Mapping[str, Any]) -> bool:
    """Whether a layer could have a bias and has none."""
    module = tree.module_of(target.path)
    has_bias = any(tree.module_of(path) == module for path in tree.biases(leaves))
    return not has_bias and not is_embedding(target.path)


def _biases(name: str, params: Any, plan: Sequence[Target], bias: Bias) -> list[str]:
    if bias == "none":
        return []
    paths = tree.biases(params)
    if bias in ("adapted", "added"):
        modules = {tree.module_of(target.path) for target in plan}
        paths = [path for path in paths if tree.module_of(path) in modules]
    if not paths and bias != "added":
        raise PeftError(f"{name}: bias={bias!r} was asked for but the model has no such bias")
    return paths
