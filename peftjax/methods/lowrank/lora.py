"""LoRA: train a rank-r product beside each frozen weight.

Paper: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, arXiv 2106.09685.

    y = x·W + s · (x·aᵀ)·b        a [r, in], b [r, out], s = alpha / r   (rsLoRA: alpha / √r)

Trained: a and b, r·(in + out) numbers a weight; biases on request. Backward keeps, per adapted layer,
the layer's input x once (shared with its neighbors) and the thin x·aᵀ; never a merged weight, never a
full gradient.

Start: a ~ U(-1/√in, 1/√in), b = 0, as the authors' code does (the paper says Gaussian: `init=
"gaussian"`, N(0, 1/r²)); lookup tables start with a = 0, b ~ N(0, 1). Defaults r = 8, alpha = 16 (s = 2) are
those of common practice, not of the paper. Convolutions with groups share `a` among the groups, so that
they merge exactly; the usual PyTorch library trains an ungrouped `a` there and cannot merge.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax.numpy as jnp
from jax import Array

from peftjax.core import tree
from peftjax.core.errors import PeftError
from peftjax.core.tree import Targets
from peftjax.methods._targets import Target, all_layers, key_for, keys_of_matrices
from peftjax.methods.lowrank._factors import (
    Bias,
    Start,
    find_targets,
    is_embedding,
    start_gaussian,
    start_orthogonal,
    start_uniform,
)
from peftjax.transform.around import Around
from peftjax.transform.frozen import Frozen, Trainable
from peftjax.transform.transform import MethodInfo, Transform
from peftjax.weights.base import Weight
from peftjax.weights.low_rank import LowRank
from peftjax.weights.shifted import Shifted

SHIFT = "shift"
"""The slot of a bias that the method adds to a layer."""


@dataclass(frozen=True)
class Wrap:
    """What a method puts around a low-rank weight.

    Attributes:
        init: `(target, base) -> (trained slots, frozen slots)` of one target.
        apply: `(target, low-rank weight, its slots) -> weight`.
    """

    init: Callable[[Target, Any], tuple[dict[str, Array], dict[str, Array]]]
    apply: Callable[[Target, LowRank, Mapping[str, Array]], Weight]


STARTS: dict[str, Start] = {
    "uniform": start_uniform,
    "gaussian": start_gaussian,
    "orthogonal": start_orthogonal,
}


def lora(
    *,
    rank: int = 8,
    alpha: float = 16.0,
    targets: Targets = "all-linear",
    exclude: Targets | None = None,
    layers: int | Sequence[int] | None = None,
    layers_pattern: str | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    layouts: Mapping[str, str] | None = None,
    rslora: bool = False,
    init: Literal["uniform", "gaussian", "orthogonal"] = "uniform",
    bias: Bias = "none",
    dropout: float = 0.0,
) -> Transform:
    """Low-rank adaptation of the targeted weights (arXiv 2106.09685).

    Args:
        rank: r; at most the smaller side of each weight.
        alpha: numerator of the scale.
        targets: a regular expression over whole names, a list of names or path suffixes, or
            'all-linear'. A weight answers to its own path and, called 'kernel', 'weight' or
            'embedding', to its module's.
        exclude: the same forms; wins over `targets`.
        layers: only these layers, by the number in the path or along the stacked axis.
        layers_pattern: the name of the list of layers, where paths hold several numbers.
        rank_pattern: rank by pattern; the first key that matches the end of a name wins.
        alpha_pattern: alpha by pattern.
        layouts: axes by pattern, a letter per axis: 's' stack, 'i' input, 'o' output.
        rslora: scale by alpha / sqrt(r) (arXiv 2312.03732).
        init: how `a` starts; 'orthogonal' starts both factors with product zero and needs an even r.
        bias: train no bias ('none'), those of the adapted modules ('adapted'), or all; 'added' gives adapted
            linear layers and convolutions that have none a bias too, which cannot be merged into the model.
        dropout: on the adapter's input, when `apply` is given a key.

    Raises:
        PeftError: here for an option out of range; in `init` for targets, ranks or layers that do not
            fit the parameters.
    """
    options = checked_options("lora", dict(locals()))
    return low_rank("lora", options, STARTS[init])


def checked_options(name: str, given: Mapping[str, Any], leave_out: Sequence[str] = ()) -> dict[str, Any]:
    """The options of `lora`, defaults filled in, without those that a variant does not have.

    Raises:
        PeftError: an option is unknown or out of range.
    """
    known = {
        option: parameter.default
        for option, parameter in inspect.signature(lora).parameters.items()
        if option not in leave_out
    }
    for option in given:
        if option not in known:
            raise PeftError(f"{name}: unknown option {option!r}; did you mean {tree.nearest(option, known)}?")
    options = {**known, **given}
    if options["layers"] is not None and not isinstance(options["layers"], int):
        options["layers"] = [int(layer) for layer in options["layers"]]
    if options.get("init", "uniform") not in STARTS:
        raise PeftError(f"{name}: init {options['init']!r} is unknown; choose one of {', '.join(STARTS)}")
    if not 0.0 <= options["dropout"] < 1.0:
        raise PeftError(f"{name}: dropout must lie in [0, 1), got {options['dropout']}")
    if options["bias"] not in get_args(Bias):
        raise PeftError(f"{name}: bias must be 'none', 'adapted', 'all' or 'added', got {options['bias']!r}")
    if options["rank"] < 1:
        raise PeftError(f"{name}: rank must be positive, got {options['rank']}")
    return options


def low_rank(
    name: str,
    options: Mapping[str, Any],
    start: Start,
    *,
    wrap: Wrap | None = None,
    rslora: bool = False,
    train_a: bool = True,
    one_way: bool = False,
    around: Around | None = None,
) -> Transform:
    """A method whose weights are `base + scale · aᵀb`, as a `Transform`.

    Args:
        name: the method's name.
        options: all of them, checked: what the transform can be made from again.
        start: the factors and base at the beginning.
        wrap: what is put around each low-rank weight, with its own slots.
        rslora: scale by alpha / sqrt(r), where the method has no such option.
        train_a: False keeps `a` frozen, so that the backward pass needs no input x.
        one_way: whether the method depends on which side of a weight is the input.
        around: what the method does around the optimizer.
    """
    dropout, bias = options["dropout"], options["bias"]
    names = (
        "rank", "alpha", "targets", "exclude", "layers", "layers_pattern", "rank_pattern",
        "alpha_pattern", "layouts",
    )  # fmt: skip
    where = {key: options[key] for key in names}
    where |= {"rslora": options.get("rslora", rslora), "one_way": one_way}

    def init(key: Array, params: Any) -> tuple[Frozen, Trainable]:
        plan = find_targets(params, who=name, **where)
        leaves = tree.named_leaves(params)
        trainable: dict[str, dict[str, Array]] = {}
        state: dict[str, dict[str, Array]] = {}
        bases: dict[str, Any] = {}
        for target in plan:
            a, b, bases[target.path] = start(key_for(key, target.path), target, leaves[target.path])
            trainable[target.path] = {"a": a, "b": b} if train_a else {"b": b}
            state[target.path] = {} if train_a else {"a": a}
            if bias == "added" and _lacks_bias(target, leaves):
                trainable[target.path][SHIFT] = jnp.zeros((*target.stack, target.layout.matrix[1]))
            if wrap is not None:
                slots, kept = wrap.init(target, bases[target.path])
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
                keys_of_matrices(key, target) if dropout > 0.0 else None,
            )
            weight = weight if wrap is None else wrap.apply(target, weight, slots)
            if SHIFT in slots:
                weight = Shifted(weight, all_layers(slots[SHIFT], target), target.layout)
            rewritten[target.path] = weight
        return tree.replace(params, rewritten)

    return Transform(name, options, init, apply, around=around)


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


METHOD = MethodInfo(
    name="lora",
    factory=lora,
    paper="LoRA, Hu et al. 2022, arXiv 2106.09685",
    trains="r·(in + out)",
    keeps="the input x (shared) and x·aᵀ",
    example={"rank": 2, "alpha": 4.0},
)
