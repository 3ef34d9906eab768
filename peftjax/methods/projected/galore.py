"""GaLore: all weights trained, the optimizer's state kept for a rank-r projection of each gradient.

Paper: Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", ICML 2024, arXiv
2403.03507.

    G = dL/dW [in, out],   P [r, in] the leading left singular vectors of G at every T-th step
    W ← W − lr · scale · Pᵀ N,        N the inner optimizer's update for P G [r, out]

(the input side compressed; the output side likewise, with Q [r, out] and G Qᵀ). The smaller side is the one
that is compressed, of a square matrix the input side. Everything else (embeddings, norms, output layer) is
trained as it is, by the same optimizer.

Between two refreshes this trains `W + scale · PᵀZ` in Z alone, from Z = 0 (`projected.py`): its gradient is
P G by products with r rows, and no step makes an array `[in, out]`. Backward keeps x·Pᵀ, r numbers a token,
and not the input x (on an output side it keeps x). The optimizer is any of optax, `pj.optim.eight_bit` around
it included, and it sees P G: `optax.clip_by_global_norm` clips the norm of the projected gradients (the full
norm is never known), accumulation adds them up, decoupled weight decay is that of W. What else an optimizer
reads of a parameter it reads of Z, which begins as zero: give Adafactor `multiply_by_parameter_scale=False`.

State for W: P and Z, r·in + r·out numbers, and the optimizer's for r·out. Z holds what has been learned since
the refresh in its own dtype, so that in bfloat16 no step is lost to the rounding of W, as it is in the
authors' code; it is r·out numbers that their code does not have. With `write="step"` there is no Z either:
every step puts `scale · PᵀZ` into W, matrix after matrix and in place, at 2·r·in·out FLOPs, and in bfloat16
with that rounding. A refresh costs one to five gradient passes; those of 'subspace' form no gradient of a
weight either (`refresh.py`).

Defaults: T = 200 and scale 0.25 are the authors' for pre-training (scale 4, r = 4 or 8, T = 500 for tuning a
classifier); r = 128 is that of their 60M model. Their Adam has eps 1e-6 outside of the bias correction and
decays the updated weight: `pj.optim.adamw` is that one, `optax.adamw` the usual one. Moments are kept as they
are at a refresh, as released; 'rotate' turns them into the new basis, 'reset' begins anew.
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
