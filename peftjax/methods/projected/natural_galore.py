"""Natural GaLore: GaLore whose projected gradients are preconditioned by their own history.

Paper: Das, "Natural GaLore: Accelerating GaLore for memory-efficient LLM Training and Fine-tuning", 2024,
arXiv 2410.16029.

    g = vec(P G),   H = [the last s of them, g included]
    g~ = (λ I + H Hᵀ)⁻¹ g = H c,     (λ I + Hᵀ H) c = e_last

and the optimizer is given g~ in the place of g (`peftjax.optim.natural` has the form and its accuracy).
Everything else is GaLore's, so that no step forms a gradient `[in, out]` either.

Kept for W beside GaLore's state: s · r · max(in, out) numbers of H, ten times Adam's moments of the same
projection at s = 20: at r = 4 it is nothing, at r of pre-training (a quarter of the width) it is more than
Adam keeps for the whole of W. `variant="released"` projects both sides, where H is s · r².

Defaults: s = 20 and λ = 1e-3 are fixed in the authors' code, whose variant projects both sides while their
paper projects one. H is not turned or cleared at a refresh there, and mixes two bases for s - 1 steps;
`moments="reset"` clears it.
"""

from collections.abc import Mapping
from typing import Literal

from peftjax.core.errors import PeftError
from peftjax.core.tree import Targets
from peftjax.methods.projected._projected import Write, checked, projected
from peftjax.optim.natural import scale_by_natural_gradient
from peftjax.optim.refresh import Method
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform


@register(
    kind="optimizer",
    paper="Natural GaLore, Das 2024, arXiv 2410.16029",
    trains="everything, in r·max(in, out) numbers at a time",
    backward_keeps="x·Pᵀ where the input side is compressed, else x",
    quantized_base=False,
    conformance=Conformance(example={"rank": 2, "history": 3}),
)
def natural_galore(
    *,
    rank: int = 128,
    every: int = 200,
    scale: float = 0.25,
    history: int = 20,
    damping: float = 1e-3,
    variant: Literal["paper", "released"] = "paper",
    basis: Method = "auto",
    iterations: int = 2,
    together: int | None = None,
    moments: Literal["keep", "reset"] = "keep",
    targets: Targets = "all-linear",
    exclude: Targets | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    layouts: Mapping[str, str] | None = None,
    train_rest: bool = True,
    write: Write = "refresh",
    dtype: str = "float32",
) -> Transform:
    """GaLore with the natural gradient in its subspace (arXiv 2410.16029).

    Args:
        rank: as in `galore`, as is every option that is not explained here.
        every: T.
        scale: of the projected update.
        history: s, the projected gradients remembered, the current one included.
        damping: λ.
        variant: 'paper' projects the smaller side, 'released' both.
        basis: how a projector is found.
        iterations: of 'subspace'.
        together: how many parameters get their bases in one program.
        moments: 'keep' or 'reset', which clears H too.
        targets: as in `lora`.
        exclude: as in `lora`.
        rank_pattern: rank by pattern.
        layouts: axes by pattern.
        train_rest: train all other parameters as they are.
        write: at each 'refresh' or each 'step'.
        dtype: of projectors, Z, H and the optimizer's state.

    Raises:
        PeftError: as `galore`.
    """
    options = checked("natural_galore", {**locals(), "side": "smaller"})
    del options["side"]
    if variant not in ("paper", "released"):
        raise PeftError(f"natural_galore: variant must be 'paper' or 'released', got {variant!r}")
    if moments == "rotate":
        raise PeftError("natural_galore: a history cannot be rotated; set moments to 'keep' or 'reset'")
    natural = scale_by_natural_gradient(history, damping)
    side = "smaller" if variant == "paper" else "both"
    return projected("natural_galore", options, side=side, precondition=natural)
