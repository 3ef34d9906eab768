"""C³A: an update made of circulant blocks, multiplied by way of a Fourier transform.

Paper: Chen et al., "Parameter-Efficient Fine-Tuning via Circular Convolution", ACL Findings 2025, arXiv
2407.19342.

    y_j = (x·W)_j + 1/in · Σ_i  k_ij ⋆ x_i      x and y cut into blocks of b numbers, k [in/b, out/b, b]
    (k ⋆ x)_t = Σ_s k_s · x_(s + t mod b)       the circular correlation

Trained: k, in·out/b numbers a weight, float32, 0 at first; an update of any rank. Backward keeps x, which the
layer shares with its neighbors, and transforms it again. The transforms are in float32, for half the
frequencies, since their input is real; no circulant matrix is formed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import Array

from peftjax.core.checks import positive
from peftjax.core.errors import PeftError
from peftjax.methods._options import TargetOptions
from peftjax.methods._targets import Target
from peftjax.methods._weights import Slots, of_weights
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform
from peftjax.weights.mapped import Mapped


@dataclass(frozen=True, kw_only=True)
class C3aOptions(TargetOptions):
    """Those of `c3a`.

    Attributes:
        block: b, the size of a block; it divides the inputs and the outputs of each weight.
    """

    block: int = 256

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for an option out of range."""
        super().require_valid(caller)
        positive(caller, "block", self.block)


@register(
    kind="adapter",
    paper="C³A, Chen et al. 2025, arXiv 2407.19342",
    trains="in·out/b",
    backward_keeps="the input x (shared)",
    conformance=Conformance(
        example={"block": 2, "targets": r"(?!.*(head|classifier|router|conv_1)/).*kernel"}
    ),
)
@takes(C3aOptions)
def c3a(options: C3aOptions) -> Transform:
    """Add circulant blocks to the targeted weights (arXiv 2407.19342).

    Raises:
        PeftError: here for an option out of range; in `init` for targets or blocks that do not fit the
            parameters.
    """
    size = options.block

    def start(key: Array, target: Target, base: Any) -> tuple[Slots, Slots]:
        n, m = target.layout.matrix
        if n % size or m % size:
            raise PeftError(
                f"c3a: blocks of {size} do not divide {target.path!r}, a matrix of {n} x {m}; choose another "
                "size or exclude it"
            )
        return {"kernel": jnp.zeros((*target.stack, n // size, m // size, size))}, {}

    def weight(target: Target, base: Any, slots: Mapping[str, Array], keys: Array | None) -> Mapped:
        return Mapped(base, slots, target.layout, _correlated, "beside")

    return of_weights("c3a", options, start, weight, one_way=True)


def _correlated(slots: Mapping[str, Array], x: Array) -> Array:
    """The correlations of the blocks of x, summed for each block of the result."""
    kernel = slots["kernel"].astype(jnp.float32)
    blocks = x.astype(jnp.float32).reshape(*x.shape[:-1], len(kernel), -1)
    of_x, of_kernel = jnp.fft.rfft(blocks), jnp.conj(jnp.fft.rfft(kernel))
    mixed = jnp.einsum("...nf,nmf->...mf", of_x, of_kernel)
    y = jnp.fft.irfft(mixed, n=kernel.shape[-1]) / x.shape[-1]
    return y.reshape(*x.shape[:-1], -1).astype(x.dtype)
