"""Weight Compander: train each weight through a bounded function that is steep at zero.

Paper: Cakaj et al., "Weight Compander: A Simple Weight Reparameterization for Regularization", IJCNN 2023,
arXiv 2306.16993.

    W = a · arctan(V / b)      V [in, out]; a, b > 0, one of each a matrix
    dV = dW · (a/b) / (1 + (V/b)²)

So |W| < a·π/2, large entries move less, and small ones more. Trained: V, from which W is formed in its layer,
with `learn` a and b as the softplus of a number each, and, unless `train_rest=False`, all other parameters.
Backward keeps the layer's input x. At first a is `headroom` times the largest |W|, b = a / slope, and
V = b · tan(W / a), so that the model is as it was. Defaults are ours: see the page.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from peftjax.core.checks import at_least, positive
from peftjax.methods._targets import Target
from peftjax.methods._weights import Slots
from peftjax.methods.structured._trained import TrainedOptions, of_trained_weights
from peftjax.transform.options import takes
from peftjax.transform.registry import register
from peftjax.transform.transform import Transform
from peftjax.weights.formed import Formed


@dataclass(frozen=True, kw_only=True)
class CompanderOptions(TrainedOptions):
    """Those of `weight_compander`.

    Attributes:
        headroom: a at first, as a multiple of the largest entry of each matrix; at least 0.7, as there is no
            arctan of more than π/2.
        slope: a/b at first, the derivative at zero; above 1 so that small entries are pushed away from zero.
        learn: train a and b too, the paper's extended version.
    """

    headroom: float = 1.0
    slope: float = 2.0
    learn: bool = True

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for an option out of range."""
        super().require_valid(caller)
        positive(caller, "slope", self.slope)
        at_least(caller, "headroom", self.headroom, 0.7)


@register(
    kind="adapter",
    paper="Weight Compander, Cakaj et al. 2023, arXiv 2306.16993",
    trains="in·out + 2, and all that is not targeted",
    backward_keeps="the input x (shared)",
    quantized_base=False,
)
@takes(CompanderOptions)
def weight_compander(options: CompanderOptions) -> Transform:
    """Train the targeted weights through a bounded function (arXiv 2306.16993).

    Raises:
        PeftError: here for an option out of range; in `init` for targets that do not fit the parameters, or a
            base that is not a plain array.
    """

    def start(key: Array, target: Target, w: Array) -> tuple[Slots, Slots]:
        largest = jnp.max(jnp.abs(w), axis=(-1, -2))
        a = options.headroom * jnp.where(largest > 0, largest, 1.0)
        b = a / options.slope
        sizes = {"a": _raw(a), "b": _raw(b)}
        v = b[..., None, None] * jnp.tan(w / a[..., None, None])
        return ({"v": v, **sizes}, {}) if options.learn else ({"v": v}, sizes)

    def weight(target: Target, dtype: str, slots: Mapping[str, Array]) -> Formed:
        return Formed(slots, target.layout, companded, dtype)

    return of_trained_weights("weight_compander", options, start, weight)


def companded(slots: Mapping[str, Array]) -> Array:
    """The matrix of `v [in, out]` and the raw numbers `a` and `b`."""
    a, b = jax.nn.softplus(slots["a"]), jax.nn.softplus(slots["b"])
    return a * jnp.arctan(slots["v"] / b)


def _raw(value: Array) -> Array:
    """The number whose softplus is the value."""
    return value + jnp.log(-jnp.expm1(-value))
