"""SNELLA: SNELL with a mixed kernel, its sparsity a budget that the matrices compete for.

Paper: Shen et al., "Kernelized Sparse Fine-Tuning with Bi-level Parameter Competition for Vision Models",
2025, arXiv 2510.24037.

    D = c Σ_p (-1)^p ‖a[p, :, i] - b[p, :, j]‖        a [P, q, n], b [P, q, m], q = r / P
    dW = D + alpha · softmax_j(D / gamma) + beta,      the softmax over the outputs j
    dW^s = dW · |dW| · 1[|dW| > t],  t = quantile(|dW|, sparsity_l)      (other modes: see `snell`)
    y = x·(W + dW^s)

Trained: a, b and the scalars alpha, gamma, beta, r·(n + m) + 3 numbers a weight. `frozen.state` holds the
levels `sparsity [*stack]`, set before an epoch from importance averages of twice the factors' size
(`_budget.py`). Backward keeps what SNELL keeps. Defaults: heads, coefficient and betas are the released
code's, initial_sparsity 0.01 and 100 epochs its VTAB scripts', 0.55 the median of its 11 targets.
"""

from dataclasses import dataclass
from typing import Literal

from peftjax.core.checks import one_of
from peftjax.kernels.kernelized_merge import KernelFunction
from peftjax.methods._importance import track_importance
from peftjax.methods.sparse._budget import Budget, share_out
from peftjax.methods.sparse._kernelized import kernelized
from peftjax.methods.sparse._options import KernelizedOptions
from peftjax.transform.around import Around
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform


@dataclass(frozen=True, kw_only=True)
class SnellaOptions(KernelizedOptions):
    """Those of `snella`.

    Attributes:
        total_steps: optimizer steps of the training.
        allocate_every: steps between two allocations, the authors' epoch; None is a hundredth of them.
        sparsity: the share of all weights that is pruned in the end.
        initial_sparsity: the share of each matrix that is pruned at first.
        init_warmup: allocations at the beginning that are left out.
        final_warmup: epochs at the end that have the final budget.
        beta1: decay of the average importance.
        beta2: decay of its average deviation.
        mode: the sparsifier.
    """

    total_steps: int
    allocate_every: int | None = None
    sparsity: float = 0.55
    initial_sparsity: float = 0.01
    init_warmup: int = 0
    final_warmup: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    mode: Literal["released", "paper", "hard", "none"] = "released"

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for an option out of range, but for those of the budget."""
        super().require_valid(caller)
        one_of(caller, "mode", self.mode, ("released", "paper", "hard", "none"))

    @property
    def budget(self) -> Budget:
        """What the matrices compete for."""
        every = max(1, self.total_steps // 100) if self.allocate_every is None else self.allocate_every
        shares, warmups = (self.sparsity, self.initial_sparsity), (self.init_warmup, self.final_warmup)
        return Budget(*shares, self.total_steps, every, *warmups, self.beta1, self.beta2)


@register(
    kind="adapter",
    paper="SNELLA, Shen et al. 2025, arXiv 2510.24037",
    trains="r·(in + out) + 3",
    backward_keeps="the input x (shared), a threshold and three scalars",
    of_steps=lambda steps: {"total_steps": steps},
    conformance=Conformance(
        example={
            "rank": 2,
            "coefficient": 1.0,
            "initial_sparsity": 0.3,
            "total_steps": 20,
            "allocate_every": 5,
        },
        starts_as_base=False,
    ),
)
@takes(SnellaOptions)
def snella(options: SnellaOptions) -> Transform:
    """Sparse tuning with a mixed kernel and a shared budget (arXiv 2510.24037).

    Raises:
        PeftError: here for an option out of range; in `init` for targets, ranks or layers that do not fit the
            parameters.
    """
    budget = options.budget
    kernel_function = KernelFunction("distance", options.coefficients, options.mode, mixed=True)
    sparsified = options.mode != "none"
    tracked = track_importance("budget", budget.beta1, budget.beta2, ("a", "b"))
    return kernelized(
        "snella",
        vars(options),
        lambda target: (kernel_function, options.initial_sparsity),
        start_of_scalars={"alpha": 1.0, "gamma": 1.0, "beta": 0.0},
        around=Around(updates=tracked) if sparsified else None,
        advances=(share_out(budget),) if sparsified else (),
    )
