"""FourierFT: an update whose two-dimensional Fourier transform is a few trained numbers.

Paper: Gao et al., "Parameter-Efficient Fine-Tuning with Discrete Fourier Transform", ICML 2024, arXiv
2405.03003.

    W' = W + s · Re(F⁻¹·C·F⁻¹)      C [in, out] has c_1 ... c_K at fixed random frequencies, 0 elsewhere

Trained: c, K numbers a weight, float32, 0 at first; K = 1000 and s = 150 by default. Each layer forms the
update, from half of its spectrum, since it is real. Backward keeps x and c.
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


@register(
    kind="adapter",
    paper="FourierFT, Gao et al. 2024, arXiv 2405.03003",
    trains="K",
    backward_keeps="the input x (shared)",
    conformance=Conformance(example={"count": 6}),
)
@takes(SpectrumOptions)
def fourierft(options: SpectrumOptions) -> Transform:
    """Add a matrix of a few Fourier coefficients to the targeted weights (arXiv 2405.03003).

    Raises:
        PeftError: here for an option out of range; in `init` for targets that do not fit the parameters, or
            that have fewer numbers than `count`.
    """

    def start(key: Array, target: Target, base: Any) -> tuple[Slots, Slots]:
        options.require_fits("fourierft", target)
        return {"spectrum": jnp.zeros((*target.stack, options.count))}, {}

    def weight(target: Target, base: Any, slots: Mapping[str, Array], keys: Array | None) -> Added:
        change = Waves(target.layout.matrix, options.seed, options.scale)
        return Added(base, slots, target.layout, change)

    return of_weights("fourierft", options, start, weight, one_way=True)


@dataclass(frozen=True)
class Waves:
    """The update of one matrix of this shape."""

    shape: tuple[int, int]
    seed: int
    scale: float

    def __call__(self, slots: Mapping[str, Array]) -> Array:
        """`scale · Re(F⁻¹·C·F⁻¹)`."""
        n, m = self.shape
        numbers = slots["spectrum"].astype(jnp.float32)
        # Frequencies are numbered as in a matrix [out, in].
        of_output, of_input = np.divmod(locations(self.seed, n * m, len(numbers)), n)
        # The real part: half of each number there, and half at the opposite frequency.
        rows = np.concatenate([of_input, -of_input % n])
        columns = np.concatenate([of_output, -of_output % m])
        held = np.flatnonzero(columns <= m // 2)
        spectrum = (
            jnp.zeros((n, m // 2 + 1))
            .at[rows[held], columns[held]]
            .add(0.5 * jnp.concatenate([numbers, numbers])[held])
        )
        return self.scale * jnp.fft.irfft2(spectrum, s=(n, m))
