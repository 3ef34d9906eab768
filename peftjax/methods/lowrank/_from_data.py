"""LoRA whose factors start from statistics of some data, and how it comes back from a file without them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
from jax import Array

from peftjax.core.errors import PeftError
from peftjax.methods._targets import Target, all_layers
from peftjax.methods.lowrank._factors import ScaledTarget, start_uniform
from peftjax.methods.lowrank._options import LowRankOptions
from peftjax.methods.lowrank.lora import Wrap, low_rank
from peftjax.transform.frozen import Frozen, Trainable
from peftjax.transform.transform import Transform
from peftjax.weights.base import Weight
from peftjax.weights.canonical import to_canonical
from peftjax.weights.low_rank import LowRank

FIRST = {"a": "first_a", "b": "first_b"}
"""The names under which the state holds the factors as they started."""


@dataclass(frozen=True, kw_only=True)
class FromDataOptions(LowRankOptions):
    """Those of a method that starts from data.

    Attributes:
        loaded: whether the start is that of a saved adapter, which its file has: such a method takes no data.
    """

    loaded: bool = False


def require_data(
    caller: str, loaded: bool, option: str, given: Mapping[str, Array] | None, made: str
) -> None:
    """Raise a PeftError where data are missing, or given to a method that is loaded."""
    if loaded == (given is not None):
        raise PeftError(
            f"{caller}: {option}, from {made}, are what it starts from; give them, or loaded=True where a "
            "saved adapter has the start"
        )


def statistics_of(
    caller: str, option: str, given: Mapping[str, Array], target: Target, *, side: str | None = None
) -> Array:
    """What is given for a target, float32: of the weight's shape as matrices, or `[*stack, in, in]`.

    Raises:
        PeftError: nothing of the wanted shape is given, or only some layers of a stack are adapted.
    """
    layout = target.layout
    n = layout.matrix[0]
    wanted = layout.shape if side is None else (*layout.stack, n, n)
    found = given.get(target.path)
    if found is None or found.shape != wanted:
        raise PeftError(f"{caller}: {option} has no array of shape {wanted} for {target.path!r}")
    found = found.astype(jnp.float32)
    found = to_canonical(found, layout) if side is None else found
    return found if target.layers is None else found[jnp.asarray(target.layers)]


def matrices_of(target: Target, leaf: Any) -> Array:
    """The chosen matrices of a base `[*stack, in, out]`, float32, decoded where it is a weight."""
    dense = leaf.dense() if isinstance(leaf, Weight) else leaf
    w = to_canonical(dense, target.layout).astype(jnp.float32)
    return w if target.layers is None else w[jnp.asarray(target.layers)]


def from_factors(name: str, options: FromDataOptions, start: Any, *, rslora: bool) -> Transform:
    """LoRA with `W + s·(aᵀb - a₀ᵀb₀)`: the factors as they start are kept, and the base stays as it is.

    It is saved with `loaded=True`, without the data.

    Args:
        name: the method's name.
        options: those of the method.
        start: `(key, target, leaf) -> (a, b)`; not called for a method that is loaded.
        rslora: scale by alpha / sqrt(r), not alpha / r.
    """

    def begin(key: Array, target: ScaledTarget, leaf: Any) -> tuple[Array, Array, Any]:
        if options.loaded:
            return start_uniform(key, target, leaf)
        return (*start(key, target, leaf), leaf)

    method = low_rank(name, options, begin, rslora=rslora, wrap=Wrap(_beside))

    def init(key: Array, params: Any) -> tuple[Frozen, Trainable]:
        frozen, trainable = method.init(key, params)
        state = {
            target.path: {kept: trainable[target.path][slot] for slot, kept in FIRST.items()}
            for target in frozen.plan
        }
        return replace(frozen, state=state), trainable

    return replace(method, init=init, config={"loaded": True})


def _beside(target: Target, weight: LowRank, slots: Mapping[str, Array]) -> LowRank:
    """The weight on a base less the product that it starts with."""
    a, b = (all_layers(slots[kept], target) for kept in FIRST.values())
    return replace(weight, base=LowRank(weight.base, a, b, weight.layout, -weight.scale))
