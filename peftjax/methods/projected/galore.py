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

from collections.abc import Mapping

from peftjax.core.tree import Targets
from peftjax.methods.projected._projected import Write, checked, projected
from peftjax.optim.refresh import Compressed, Method
from peftjax.optim.rotation import Moments
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform


@register(
    kind="optimizer",
    paper="GaLore, Zhao et al. 2024, arXiv 2403.03507",
    trains="everything, in r·max(in, out) numbers at a time",
    backward_keeps="x·Pᵀ where the input side is compressed, else x",
    quantized_base=False,
    conformance=Conformance(example={"rank": 2, "scale": 1.0}),
)
def galore(
    *,
    rank: int = 128,
    every: int = 200,
    scale: float = 0.25,
    side: Compressed = "smaller",
    basis: Method = "auto",
    iterations: int = 2,
    together: int | None = None,
    moments: Moments = "keep",
    targets: Targets = "all-linear",
    exclude: Targets | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    layouts: Mapping[str, str] | None = None,
    train_rest: bool = True,
    write: Write = "refresh",
    dtype: str = "float32",
) -> Transform:
    """Training in projected gradients (arXiv 2403.03507).

    Args:
        rank: r; at most the smaller side of each weight.
        every: T, steps between two projectors.
        scale: of the projected update; the learning rate of these weights is scale · lr.
        side: which side of each matrix is compressed: 'smaller', 'larger', 'input', 'output' or 'both'
            (then the projected gradient is `[r, r]`).
        basis: how a projector is found: 'svd' and 'gram' decompose the gradient, 'subspace' iterates on
            products with it; 'auto' chooses by size as `peftjax.optim.refresh` says.
        iterations: of 'subspace', 2 gradient passes each.
        together: how many parameters get their bases in one program, None for all: fewer need less memory,
            that of their gradients ('svd', 'gram') or of a few rows for each ('subspace'), and more passes.
        moments: what a refresh does to the optimizer's moments: 'keep', 'rotate' or 'reset'.
        targets: as in `lora`.
        exclude: as in `lora`.
        rank_pattern: rank by pattern.
        layouts: axes by pattern.
        train_rest: train all other floating-point parameters as they are; else they are frozen.
        write: when what is learned is put into the weights: at each 'refresh', or at each 'step', which holds
            no Z between steps and needs `Transform.open` and `close` in the loop.
        dtype: of projectors and Z, and so of the optimizer's state: 'float32' or 'bfloat16'.

    Raises:
        PeftError: here for an option out of range; in `init` for targets or ranks that do not fit, and
            for a target that is a structured weight.
    """
    options = checked("galore", dict(locals()))
    return projected("galore", options, side=side)
