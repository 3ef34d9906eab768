"""Tied stack: a stack of few distinct layers, each repeated with a low-rank correction of its own.

Papers: Bae et al., "Relaxed Recursive Transformers: Effective Parameter Sharing with Layer-wise LoRA", ICLR
2025, arXiv 2410.20672; the sharing half of Bae et al., "Mixture-of-Recursions", NeurIPS 2025, arXiv
2507.10524.

    W_l = U_k(l) + a_lᵀ b_l        k(l) = l mod K, of L = R·K layers; a_l [r, in], b_l [r, out]

R repetitions of K distinct layers; with `ends` the first layer and the last have their own U and r too. At
first U is the mean of the layers it stands for, or one of them, and a_lᵀ b_l the first r directions of W_l -
U_k(l): rows of a orthonormal, the singular values in b. Trained: U, in·out numbers for every R layers,
r·(in + out) a layer, and, unless `train_rest=False`, all other parameters, each layer's own biases and norms
among them. No dense W is formed but one layer's U. Backward keeps x and x·aᵀ.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax import Array

from peftjax.core.checks import one_of, positive
from peftjax.core.errors import PeftError
from peftjax.core.linalg import svd_of
from peftjax.core.targets import Targets
from peftjax.methods._options import RankOptions
from peftjax.methods._targets import Target
from peftjax.methods._weights import Slots
from peftjax.methods.structured._trained import TrainedOptions, of_trained_weights
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform
from peftjax.weights.low_rank import LowRank
from peftjax.weights.repeated import Repeated, numbers_of_layers


@dataclass(frozen=True, kw_only=True)
class TiedOptions(TrainedOptions, RankOptions):
    """Those of `tied`.

    Attributes:
        targets: as in `lora`; weights of stacked layers alone.
        repeats: R, which divides the number of layers, without the first and the last with `ends`.
        rank: r of the corrections.
        start: what a distinct layer is at first: the 'average' of the layers it stands for, the layer at its
            'step' from the first layer to the last, or the first of those layers ('lower').
        ends: whether the first layer and the last are not tied.
        train_distinct: train U; else the corrections alone, and what `train_rest` says.
    """

    targets: Targets = r"(.*/)?blocks/.*kernel"
    repeats: int = 2
    rank: int = 64
    start: Literal["average", "step", "lower"] = "average"
    ends: bool = False
    train_distinct: bool = True

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for an option out of range."""
        super().require_valid(caller)
        positive(caller, "repeats", self.repeats)
        one_of(caller, "start", self.start, ("average", "step", "lower"))
        if self.layers is not None:
            raise PeftError(f"{caller}: whole stacks are tied; leave layers out")


@register(
    kind="adapter",
    paper="tied layers with a LoRA each, Bae et al. 2024, 2025, arXiv 2410.20672, 2507.10524",
    trains="in·out / R + r·(in + out), and all that is not targeted",
    backward_keeps="the input x (shared) and x·aᵀ",
    of_blocks=True,
    quantized_base=False,
    conformance=Conformance(example={"repeats": 3, "rank": 2, "train_rest": False}, starts_as_base=False),
)
@takes(TiedOptions)
def tied(options: TiedOptions) -> Transform:
    """Few layers, repeated with low-rank corrections (arXiv 2410.20672, 2507.10524).

    Raises:
        PeftError: here for an option out of range; in `init` for targets or ranks that do not fit the
            parameters, that are no stack of layers, or whose layers R does not divide.
    """

    def start(key: Array, target: Target, w: Array) -> tuple[Slots, Slots]:
        numbers = numbers_of(target, options)
        n, m = w.shape[-2:]
        distinct = distinct_of(w, numbers, options)
        svd = svd_of(w - distinct[jnp.asarray(numbers)])
        own = {
            "a": svd.u[..., : target.rank].swapaxes(-1, -2),
            "b": svd.sizes[..., : target.rank, None] * svd.vt[..., : target.rank, :],
        }
        matrices = {"distinct": distinct.reshape(-1, n, m)}
        return (own | matrices, {}) if options.train_distinct else (own, matrices)

    def weight(target: Target, dtype: str, slots: Mapping[str, Array]) -> LowRank:
        numbers = numbers_of_layers(numbers_of(target, options), target.layout.stack[1:])
        base = Repeated(numbers, slots["distinct"], target.layout, dtype)
        return LowRank(base, slots["a"], slots["b"], target.layout)

    return of_trained_weights("tied", options, start, weight)


def numbers_of(target: Target, options: TiedOptions) -> list[int]:
    """Which distinct layer each layer is.

    Raises:
        PeftError: the target is no stack, or R does not divide its layers.
    """
    if not target.layout.stack:
        raise PeftError(f"tied: {target.path!r} is no stack of layers; exclude it")
    layers = target.layout.stack[0]
    inner = layers - 2 * options.ends
    if inner <= 0 or inner % options.repeats:
        between = " between the first and the last" if options.ends else ""
        raise PeftError(
            f"tied: {options.repeats} repeats do not divide the {max(inner, 0)} layers{between} of "
            f"{target.path!r}; change repeats or ends"
        )
    count = inner // options.repeats
    cycle = [layer % count for layer in range(inner)]
    return [0, *(1 + number for number in cycle), count + 1] if options.ends else cycle


def distinct_of(w: Array, numbers: list[int], options: TiedOptions) -> Array:
    """The distinct layers `[k, ...]` of all, `[layers, ...]`."""
    of, count = np.asarray(numbers), max(numbers) + 1
    if options.start == "average":
        return jnp.stack([w[np.flatnonzero(of == number)].mean(axis=0) for number in range(count)])
    if options.start == "lower":
        picked = np.array([np.flatnonzero(of == number)[0] for number in range(count)])
        if options.ends:
            picked[-1] = len(of) - 1
    else:
        picked = np.round(np.linspace(0, len(of) - 1, count)).astype(int)
    return w[picked]
