"""QPaCA: PaCA's trained rows in a base of codes.

Paper: Woo et al., "PaCA: Partial Connection Adaptation for Efficient Fine-Tuning", ICLR 2025, arXiv
2503.01905.

    W' = decode(codes) but for the rows I, which are s · θ      I [r] rows (inputs), θ [r, out], s = alpha / r
    y = x·decode(codes) + x[I]·(s·θ - decode(codes)[I])         dθ = s · x[I]ᵀ·g

Trained: θ, r·out numbers a weight, float32. The codes never change; of the old rows, those alone are decoded.
Backward keeps x[I], r numbers a token. The paper starts θ from the decoded rows, so that the model starts as
the quantized one: that is `pj.chain(pj.nf4(), pj.paca())`. With `init_from="original"` θ starts from the rows
before they were coded, which removes their rounding error.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from jax import Array

from peftjax.core import tree
from peftjax.core.checks import one_of, positive
from peftjax.methods.quantization._base import BaseOptions, quantized_params
from peftjax.methods.quantization.quantized import Nf4CodeOptions
from peftjax.methods.sparse.paca import paca
from peftjax.transform.frozen import Frozen, Params, Trainable
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform
from peftjax.weights.rows import rows_of


@dataclass(frozen=True, kw_only=True)
class QpacaOptions(Nf4CodeOptions, BaseOptions):
    """Those of `quantized`, with NF4's double quantization as defaults, and those of `paca`.

    Attributes:
        rank: r, rows trained of each matrix; at most its inputs.
        alpha: numerator of s.
        rank_pattern: rank by pattern.
        alpha_pattern: alpha by pattern.
        init_from: what the trained rows start as: the decoded ones ('codes'), or those before they were coded
            ('original').
    """

    rank: int = 8
    alpha: float = 8.0
    rank_pattern: Mapping[str, int] | None = None
    alpha_pattern: Mapping[str, float] | None = None
    init_from: Literal["codes", "original"] = "codes"

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for an option out of range."""
        super().require_valid(caller)
        positive(caller, "rank", self.rank)
        positive(caller, "alpha", self.alpha)
        one_of(caller, "init_from", self.init_from, ("codes", "original"))


@register(
    kind="adapter",
    paper="QPaCA, Woo et al. 2025, arXiv 2503.01905",
    trains="r·out",
    backward_keeps="x[I], r numbers a token",
    quantized_base=False,
    replaces_base=True,
    conformance=Conformance(example={"rank": 2, "alpha": 4.0}, starts_as_base=False),
)
@takes(QpacaOptions)
def qpaca(options: QpacaOptions) -> Transform:
    """Quantize the targeted weights and train some of their rows (arXiv 2503.01905).

    Raises:
        PeftError: here for an option out of range; in `init` for targets, ranks or rows that do not fit.

    Examples:
        >>> params = {"up": {"kernel": jnp.ones((64, 8))}}
        >>> frozen, trainable = pj.qpaca(rank=2, init_from="original").init(jax.random.key(0), params)
        >>> frozen.params["up"]["kernel"].codes.codes.dtype.name, trainable["up/kernel"]["values"].shape
        ('uint8', (2, 8))
    """
    of_codes = paca(
        rank=options.rank,
        alpha=options.alpha,
        targets=options.targets,
        exclude=options.exclude,
        rank_pattern=options.rank_pattern,
        alpha_pattern=options.alpha_pattern,
        layouts=options.layouts,
    )

    def init(key: Array, params: Params) -> tuple[Frozen, Trainable]:
        coded, _ = quantized_params("qpaca", options.form, options, params)
        frozen, trainable = of_codes.init(key, coded)
        if options.init_from == "codes":
            return frozen, trainable
        leaves = tree.named_leaves(params)
        return frozen, {
            place.path: {
                "values": rows_of(leaves[place.path], place.layout, frozen.state[place.path]["rows"])
                / place.scale
            }
            for place in frozen.plan.places
        }

    return Transform("qpaca", {}, init, of_codes.apply)
