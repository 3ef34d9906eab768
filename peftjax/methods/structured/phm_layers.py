"""PHM layers: train sums of Kronecker products in place of weights, with about 1/n of their numbers.

Papers: Zhang et al., "Beyond Fully-Connected Layers with Quaternions: Parameterization of Hypercomplex
Multiplications with 1/n Parameters", ICLR 2021, arXiv 2102.08597; convolutions, Grassucci et al., 2022, arXiv
2110.04176.

    W = Σ_i A_i ⊗ S_i      i = 1 ... n, A_i [n, n], S_i [in/n, out/n], of a convolution [window, in/n, out/n]

Trained: n³ + in·out/n numbers a weight, and, unless `train_rest=False`, all other parameters. No dense W is
formed, but that of one convolution at a time. Backward keeps the layer's input x. With `start="random"`, A
and S are uniform and W has Glorot's variance, 2 / (in + out); with 'nearest', the sum is the one nearest to
the weight given. Weight decay on A and S shrinks W twice: leave it off for A. Default n = 4.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from peftjax.core.checks import one_of, positive
from peftjax.core.linalg import svd_of
from peftjax.methods._targets import Target
from peftjax.methods._weights import Slots
from peftjax.methods.structured import _kronecker
from peftjax.methods.structured._kronecker import RULE, WHOLE, Applied, Blocks, blocks_of, drawn
from peftjax.methods.structured._trained import TrainedOptions, of_trained_weights
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform
from peftjax.weights.base import Weight
from peftjax.weights.formed import Formed
from peftjax.weights.functional import Functional


@dataclass(frozen=True, kw_only=True)
class PhmLayersOptions(TrainedOptions):
    """Those of `phm_layers`.

    Attributes:
        order: n, which divides the inputs and outputs, or channels, of each weight.
        start: how the factors start: 'random', or 'nearest' to the weight given.
    """

    order: int = 4
    start: Literal["random", "nearest"] = "random"

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for an option out of range."""
        super().require_valid(caller)
        positive(caller, "order", self.order)
        one_of(caller, "start", self.start, ("random", "nearest"))


@register(
    kind="adapter",
    paper="PHM layers, Zhang et al. 2021, Grassucci et al. 2022, arXiv 2102.08597, 2110.04176",
    trains="in·out/n + n³, and all that is not targeted",
    backward_keeps="the input x (shared)",
    quantized_base=False,
    conformance=Conformance(
        example={"order": 2, "targets": r"(.*/)?(up|down|conv_2|query|value|out)/kernel"},
        starts_as_base=False,
    ),
)
@takes(PhmLayersOptions)
def phm_layers(options: PhmLayersOptions) -> Transform:
    """Weights that are sums of Kronecker products (arXiv 2102.08597, 2110.04176).

    Raises:
        PeftError: here for an option out of range; in `init` for targets that do not fit the parameters,
            whose sides the order does not divide, or a base that is not a plain array.
    """
    n = options.order

    def start(key: Array, target: Target, w: Array) -> tuple[Slots, Slots]:
        blocks = blocks_of("phm_layers", target, n)
        if options.start == "nearest":
            return nearest(w, blocks), {}
        outputs = target.layout.matrix[1]
        keys, bound = jax.random.split(key), math.sqrt(3.0) / n
        rule = drawn(keys[0], (*target.stack, n, n, n), 2 * n * n)
        # var W = n · var A · var S, and var A = bound² / 3.
        variance = 2.0 / (blocks.window * (blocks.channels + outputs)) / (n * bound**2 / 3.0)
        size = math.sqrt(3.0 * variance)
        shape = (*target.stack, n, blocks.rows, outputs // n)
        return {RULE: rule, WHOLE: jax.random.uniform(keys[1], shape, minval=-size, maxval=size)}, {}

    def weight(target: Target, dtype: str, slots: Mapping[str, Array]) -> Weight:
        blocks = blocks_of("phm_layers", target, n)
        if blocks.window > 1:
            return Formed(slots, target.layout, _kronecker.Formed(blocks), dtype)
        return Functional(slots, target.layout, Applied(blocks), dtype)

    return of_trained_weights("phm_layers", options, start, weight, one_way=True)


def nearest(w: Array, blocks: Blocks) -> dict[str, Array]:
    """The factors whose sum is nearest to `w [*stack, in, out]`: by the SVD of its blocks, a row of each."""
    n, stack, window = blocks.count, w.shape[:-2], blocks.window
    size, columns = blocks.channels // n, w.shape[-1] // n
    if blocks.channels_first:
        w = w.reshape(*stack, blocks.channels, window, -1).swapaxes(-3, -2)
    split = w.reshape(*stack, window, n, size, n, columns)
    at = len(stack)
    order = (*range(at), at + 1, at + 3, at, at + 2, at + 4)
    svd = svd_of(split.transpose(order).reshape(*stack, n * n, -1))
    # Fewer terms than n where S has fewer numbers: the others are zero.
    count = min(n, svd.sizes.shape[-1])
    root = jnp.sqrt(svd.sizes[..., :count, None])
    rule, factor = root * svd.u[..., :count].swapaxes(-1, -2), root * svd.vt[..., :count, :]
    missing = [(0, 0)] * at + [(0, n - count), (0, 0)]
    rule, factor = jnp.pad(rule, missing), jnp.pad(factor, missing)
    return {RULE: rule.reshape(*stack, n, n, n), WHOLE: factor.reshape(*stack, n, window * size, columns)}
