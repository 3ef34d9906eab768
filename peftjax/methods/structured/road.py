"""RoAd: rotate and scale what a weight gives, two numbers at a time.

Paper: Liao and Monz, "3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and
Composability", NeurIPS 2024, arXiv 2409.00119.

    y' = f ∘ y + g ∘ (-y₂, y₁)      y = x·W + c, c the bias; y₁ and y₂ are the halves of each group of outputs
    f = α·cos θ,  g = α·sin θ       `variant` 1: θ and α for each pair, 2: for each output
    f = α₁·cos θ₁,  g = α₂·sin θ₂   4: two of each for each output

Trained: θ, 0 at first, and α, 1 at first, float32: out numbers a weight of variant 1, 2·out of 2 and 4·out
of 4. Backward keeps x·W. Weight decay would pull α to 0, and the layer with it: leave it off.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
from jax import Array

from peftjax.core.checks import one_of
from peftjax.core.errors import PeftError
from peftjax.methods._options import TargetOptions
from peftjax.methods._targets import Target
from peftjax.methods._weights import Slots, of_weights
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform
from peftjax.weights.mapped import Mapped


@dataclass(frozen=True, kw_only=True)
class RoadOptions(TargetOptions):
    """Those of `road`.

    Attributes:
        variant: how many angles there are: 1, 2 or 4 for each pair of outputs.
        group: the number of outputs, even, of which the first half is paired with the second; it divides the
            outputs of each weight.
    """

    variant: Literal[1, 2, 4] = 1
    group: int = 64

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for an option out of range."""
        super().require_valid(caller)
        one_of(caller, "variant", self.variant, (1, 2, 4))
        if self.group < 2 or self.group % 2:
            raise PeftError(f"{caller}: group must be even and at least 2, got {self.group}")


@register(
    kind="adapter",
    paper="RoAd, Liao and Monz 2024, arXiv 2409.00119",
    trains="out, 2·out or 4·out",
    backward_keeps="x·W",
    conformance=Conformance(
        example={"group": 2, "targets": r"(?!.*(head|classifier|router|conv_1)/).*kernel"}
    ),
)
@takes(RoadOptions)
def road(options: RoadOptions) -> Transform:
    """Rotate and scale pairs of what the targeted weights give (arXiv 2409.00119).

    Raises:
        PeftError: here for an option out of range; in `init` for targets or groups that do not fit the
            parameters.
    """
    turn = Turn(options.variant, options.group)

    def start(key: Array, target: Target, base: Any) -> tuple[Slots, Slots]:
        outputs = target.layout.matrix[1]
        if outputs % options.group:
            raise PeftError(
                f"road: groups of {options.group} do not divide the {outputs} outputs of {target.path!r}; "
                "choose another size or exclude it"
            )
        shape = (*target.stack, outputs * options.variant // 2)
        return {"theta": jnp.zeros(shape), "alpha": jnp.ones(shape)}, {}

    def weight(target: Target, base: Any, slots: Mapping[str, Array], keys: Array | None) -> Mapped:
        return Mapped(base, slots, target.layout, turn, "after")

    def bias(bias: Array, slots: Mapping[str, Array], target: Target, base: Any) -> Array:
        return turn(slots, bias)

    return of_weights("road", options, start, weight, bias=bias, neutral={"alpha": 1.0}, one_way=True)


@dataclass(frozen=True)
class Turn:
    """The rotation and scaling of pairs."""

    variant: int
    group: int

    def __call__(self, slots: Mapping[str, Array], y: Array) -> Array:
        """Every pair of y turned; the slots may have the leading axes of y."""
        theta, alpha = slots["theta"], slots["alpha"]
        if self.variant == 4:
            # Those of the first factor and of the second one, group by group.
            theta, alpha = (v.reshape(*v.shape[:-1], -1, 2, self.group) for v in (theta, alpha))
            (theta, of_sine), (alpha, second) = ((v[..., 0, :], v[..., 1, :]) for v in (theta, alpha))
        else:
            theta = of_sine = self._of_each(theta)
            alpha = second = self._of_each(alpha)
        f, g = (alpha * jnp.cos(theta)).astype(y.dtype), (second * jnp.sin(of_sine)).astype(y.dtype)
        groups = y.reshape(*y.shape[:-1], -1, self.group)
        half = self.group // 2
        turned = jnp.concatenate([-groups[..., half:], groups[..., :half]], axis=-1)
        return (groups * f + turned * g).reshape(y.shape)

    def _of_each(self, numbers: Array) -> Array:
        """[..., groups, group] of the numbers of pairs or outputs."""
        size = self.group // 2 if self.variant == 1 else self.group
        groups = numbers.reshape(*numbers.shape[:-1], -1, size)
        return jnp.concatenate([groups, groups], axis=-1) if self.variant == 1 else groups
