"""WaveFT: an update whose wavelet transform is a few trained numbers.

Paper: Bilican et al., "Exploring Sparsity for Parameter Efficient Fine Tuning Using Wavelets", 2025, arXiv
2505.12532.

    W' = W + s · Hᵀ·C·H      C [in, out] has c_1 ... c_K at fixed random places, and is 0 elsewhere
                             H: one level of Haar's wavelets on each side; `transform=False` for H = I

Trained: c, K numbers a weight, float32, 0 at first; K = 2592 and s = 25 by default. Each layer forms the
update; a number changes a square of 2 x 2. Backward keeps x and c.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from peftjax.methods._targets import Target
from peftjax.methods._weights import Slots, of_weights
from peftjax.methods.structured._locations import SpectrumOptions, locations
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform
from peftjax.weights.added import Added


@dataclass(frozen=True, kw_only=True)
class WaveftOptions(SpectrumOptions):
    """Those of `waveft`.

    Attributes:
        count: K, how many numbers are trained of each weight.
        scale: of the update.
        transform: whether they are coefficients of wavelets; else entries of the update itself.
    """

    count: int = 2592
    scale: float = 25.0
    transform: bool = True


@register(
    kind="adapter",
    paper="WaveFT, Bilican et al. 2025, arXiv 2505.12532",
    trains="K",
    backward_keeps="the input x (shared)",
    conformance=Conformance(example={"count": 6}),
)
@takes(WaveftOptions)
def waveft(options: WaveftOptions) -> Transform:
    """Add a matrix of a few wavelet coefficients to the targeted weights (arXiv 2505.12532).

    Raises:
        PeftError: here for an option out of range; in `init` for targets that do not fit the parameters, or
            that have fewer numbers than `count`.
    """

    def start(key: Array, target: Target, base: Any) -> tuple[Slots, Slots]:
        options.require_fits("waveft", target)
        return {"spectrum": jnp.zeros((*target.stack, options.count))}, {}

    def weight(target: Target, base: Any, slots: Mapping[str, Array], keys: Array | None) -> Added:
        change = Wavelets(target.layout.matrix, options.seed, options.scale, options.transform)
        return Added(base, slots, target.layout, change)

    return of_weights("waveft", options, start, weight, one_way=True)


@dataclass(frozen=True)
class Wavelets:
    """The update of one matrix of this shape."""

    shape: tuple[int, int]
    seed: int
    scale: float
    transform: bool

    def __call__(self, slots: Mapping[str, Array]) -> Array:
        """`scale · Hᵀ·C·H`: each coefficient in its square of 2 x 2, with the signs of its wavelet."""
        n, m = self.shape
        numbers = self.scale * slots["spectrum"].astype(jnp.float32)
        # Places are numbered as in a matrix [out, in].
        columns, rows = np.divmod(locations(self.seed, n * m, len(numbers)), n)
        if not self.transform:
            return jnp.zeros((n, m)).at[rows, columns].add(numbers)
        # The second half of the columns are differences of rows, and the other way round.
        fine_row, row = np.divmod(rows, (n + 1) // 2)
        fine_column, column = np.divmod(columns, (m + 1) // 2)
        change = jnp.zeros((n, m))
        for down in (0, 1):
            for right in (0, 1):
                sign = 1 - 2 * ((fine_column & down) ^ (fine_row & right))
                at = (2 * row + down, 2 * column + right)
                change = change.at[at].add(0.5 * sign * numbers, mode="drop")
        return change
