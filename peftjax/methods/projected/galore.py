"""GaLore: all weights trained, the optimizer's state kept for a rank-r projection of each gradient.

Paper: Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", ICML 2024, arXiv
2403.03507.

    G = dL/dW [in, out],   P [r, in] the leading left singular vectors of G at every T-th step
    W ← W − lr · scale · Pᵀ N,        N the inner optimizer's update for P G [r, out]

The smaller side is compressed (of a square matrix the input side; an output side has Q [r, out] and G Qᵀ).
Between two refreshes this trains Z [r, out] in `W + scale · PᵀZ`, from Z = 0; its gradient is P G, and no
step makes an array `[in, out]`. All other parameters are trained as they are, by the same optimizer.
Trained: r·out numbers of Z a weight. State: P, r·in numbers, and the optimizer's for r·out. Backward keeps
x·Pᵀ, r numbers a token, on an output side the input x. Defaults: T = 200 and scale 0.25 are the authors' for
pre-training, r = 128 that of their 60M model; moments are kept as they are at a refresh, as released.
"""

from dataclasses import dataclass
from typing import get_args

from peftjax.core.checks import one_of
from peftjax.methods.projected._options import ProjectedOptions
from peftjax.methods.projected._projected import projected
from peftjax.optim.refresh import Compressed
from peftjax.optim.rotation import Moments
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform


@dataclass(frozen=True, kw_only=True)
class GaloreOptions(ProjectedOptions):
    """Those of `galore`.

    Attributes:
        side: which side of each matrix is compressed: 'smaller', 'larger', 'input', 'output' or 'both'
            (then the projected gradient is `[r, r]`).
        moments: what a refresh does to the optimizer's moments: 'keep', 'rotate' or 'reset'.
    """

    side: Compressed = "smaller"
    moments: Moments = "keep"

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for an option out of range."""
        super().require_valid(caller)
        one_of(caller, "side", self.side, get_args(Compressed))
        one_of(caller, "moments", self.moments, get_args(Moments))


@register(
    kind="optimizer",
    paper="GaLore, Zhao et al. 2024, arXiv 2403.03507",
    trains="everything, in r·max(in, out) numbers at a time",
    backward_keeps="x·Pᵀ where the input side is compressed, else x",
    quantized_base=False,
    conformance=Conformance(example={"rank": 2, "scale": 1.0}),
)
@takes(GaloreOptions)
def galore(options: GaloreOptions) -> Transform:
    """Training in projected gradients (arXiv 2403.03507).

    Raises:
        PeftError: here for an option out of range; in `init` for targets or ranks that do not fit, and
            for a target that is a structured weight.
    """
    return projected("galore", vars(options), side=options.side)
