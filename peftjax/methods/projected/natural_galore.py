"""Natural GaLore: GaLore whose projected gradients are preconditioned by their own history.

Paper: Das, "Natural GaLore: Accelerating GaLore for memory-efficient LLM Training and Fine-tuning", 2024,
arXiv 2410.16029.

    g = vec(P G),   H = [the last s of them, g included]
    g~ = (λ I + H Hᵀ)⁻¹ g = H c,     (λ I + Hᵀ H) c = e_last

and the optimizer is given g~ instead of g (form and accuracy: `peftjax.optim.natural`). Everything else, what
is trained and what backward keeps included, is GaLore's: no step forms a gradient `[in, out]` either.
State beside GaLore's: s · r · max(in, out) numbers of H, s · r² with `variant="released"`, which projects
both sides. Defaults: s = 20 and λ = 1e-3 are fixed in the authors' code.
"""

from dataclasses import dataclass
from typing import Literal

from peftjax.core.checks import one_of
from peftjax.core.errors import PeftError
from peftjax.methods.projected._options import ProjectedOptions
from peftjax.methods.projected._projected import projected
from peftjax.optim.natural import scale_by_natural_gradient
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform


@dataclass(frozen=True, kw_only=True)
class NaturalGaloreOptions(ProjectedOptions):
    """Those of `natural_galore`.

    Attributes:
        history: s, the projected gradients remembered, the current one included.
        damping: λ.
        variant: 'paper' projects the smaller side, 'released' both.
        moments: what a refresh does to the optimizer's moments: 'keep', or 'reset', which clears H too; a
            history cannot be rotated.
    """

    history: int = 20
    damping: float = 1e-3
    variant: Literal["paper", "released"] = "paper"
    moments: Literal["keep", "reset"] = "keep"

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for an option out of range."""
        super().require_valid(caller)
        one_of(caller, "variant", self.variant, ("paper", "released"))
        if self.moments == "rotate":
            raise PeftError(f"{caller}: a history cannot be rotated; set moments to 'keep' or 'reset'")
        one_of(caller, "moments", self.moments, ("keep", "reset"))


@register(
    kind="optimizer",
    paper="Natural GaLore, Das 2024, arXiv 2410.16029",
    trains="everything, in r·max(in, out) numbers at a time",
    backward_keeps="x·Pᵀ where the input side is compressed, else x",
    quantized_base=False,
    conformance=Conformance(example={"rank": 2, "history": 3}),
)
@takes(NaturalGaloreOptions)
def natural_galore(options: NaturalGaloreOptions) -> Transform:
    """GaLore with the natural gradient in its subspace (arXiv 2410.16029).

    Raises:
        PeftError: as `galore`.
    """
    natural = scale_by_natural_gradient(options.history, options.damping)
    side = "smaller" if options.variant == "paper" else "both"
    return projected("natural_galore", vars(options), side=side, precondition=natural)
