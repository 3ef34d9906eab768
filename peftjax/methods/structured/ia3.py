"""(IA)³: rescale keys, values and the hidden features of the feed-forward layers.

Paper: Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
NeurIPS 2022, arXiv 2205.05638.

    y = (x·W + c) ∘ l      l [out], c the bias, or, of `inputs`,      y = (x ∘ l)·W + c      l [in]

Trained: l, float32, 1 at first. Backward keeps what is rescaled, x·W or x. Weight decay would pull l to 0,
and the layer with it: leave it off. The paper trains with a learning rate of 3e-3.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import Array

from peftjax.core.targets import Targets, select
from peftjax.methods._options import TargetOptions
from peftjax.methods._targets import Target
from peftjax.methods._weights import Slots, of_weights
from peftjax.transform.options import takes
from peftjax.transform.registry import register
from peftjax.transform.transform import Transform
from peftjax.weights.diagonal import Diagonal
from peftjax.weights.layout import Side


@dataclass(frozen=True, kw_only=True)
class SidedTarget(Target):
    """A target that is rescaled on one side."""

    side: Side


@dataclass(frozen=True, kw_only=True)
class Ia3Options(TargetOptions):
    """Those of `ia3`.

    Attributes:
        inputs: which of the targets are rescaled where their input is, in the same forms; such as the second
            layer of a feed-forward.
    """

    inputs: Targets | None = None

    def find(self, caller: str, params: Any, *, one_way: bool = False, **ranks: Any) -> list[Target]:
        """Every weight that they ask for, with its side; raises as `find_targets`, of `inputs` too."""
        found = super().find(caller, params, one_way=one_way, **ranks)
        entering = [] if self.inputs is None else select(params, self.inputs, caller=f"{caller}: inputs")
        return [SidedTarget(**vars(own), side="i" if own.path in entering else "o") for own in found]


@register(
    kind="adapter",
    paper="(IA)³, Liu et al. 2022, arXiv 2205.05638",
    trains="out, or in",
    backward_keeps="x·W, or x",
)
@takes(Ia3Options)
def ia3(options: Ia3Options) -> Transform:
    """Rescale what the targeted weights give, or what they are given (arXiv 2205.05638).

    Raises:
        PeftError: in `init` for targets that do not fit the parameters.

    Examples:
        >>> params = {"key": {"kernel": jnp.ones((4, 8))}, "down": {"kernel": jnp.ones((16, 4))}}
        >>> method = pj.ia3(targets=["key", "down"], inputs=["down"])
        >>> jax.tree.map(jnp.shape, method.init(jax.random.key(0), params)[1])
        {'down/kernel': {'input': (16,)}, 'key/kernel': {'output': (8,)}}
    """
    return of_weights(
        "ia3", options, _start, _weight, bias=_bias, neutral={"input": 1.0, "output": 1.0}, one_way=True
    )


def _start(key: Array, target: Target, base: Any) -> tuple[Slots, Slots]:
    assert isinstance(target, SidedTarget)
    n, m = target.layout.matrix
    if target.side == "i":
        return {"input": jnp.ones((*target.stack, n))}, {}
    return {"output": jnp.ones((*target.stack, m))}, {}


def _weight(target: Target, base: Any, slots: Mapping[str, Array], keys: Array | None) -> Diagonal:
    return Diagonal(base, target.layout, by_input=slots.get("input"), by_output=slots.get("output"))


def _bias(bias: Array, slots: Mapping[str, Array], target: Target, base: Any) -> Array:
    return bias * slots["output"] if "output" in slots else bias
