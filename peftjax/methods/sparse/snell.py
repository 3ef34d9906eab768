"""SNELL: sparse tuning whose sparse update is recomputed from two low-rank factors in every step.

Paper: Shen et al., "Expanding Sparse Tuning for Low Memory Usage", NeurIPS 2024, arXiv 2411.01800.

    D_p[i, j] = ‖a[p, :, i] - b[p, :, j]‖        a [P, q, n], b [P, q, m], q = r / P
    dW = Σ_p c_p D_p,  c_p = ±c alternating        t = quantile(|dW|, s), one per matrix
    released   dW^s = dW · |dW| · 1[|dW| > t]      paper   dW · max(|dW| - t, 0)      hard   dW · 1[|dW| > t]
    y = x·(W + dW^s)

Trained: a and b, r·(n + m) numbers a weight as in LoRA, but dW is of high rank and sparse; `sigmoid` and
`rbf` train scale, rate and shift too. Backward keeps the layer's input x (shared) and t; distances, dW and
masks are recomputed. t and the factor beside dW are constants in backward, as in the released code. Defaults:
P = 2 and c = 0.1 are the released code's, s = 0.4 the median of its 19 values for VTAB.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import jax.numpy as jnp

from peftjax.core import tree
from peftjax.core.checks import fraction, one_of
from peftjax.core.errors import PeftError
from peftjax.core.targets import pattern_value, require_patterns_used
from peftjax.kernels.kernelized_merge import KernelFunction
from peftjax.methods._targets import Target
from peftjax.methods.sparse._budget import LEVEL
from peftjax.methods.sparse._kernelized import kernelized
from peftjax.methods.sparse._options import KernelizedOptions
from peftjax.transform.frozen import Frozen
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform

Sparsity = float | Mapping[str, float]

# The start of the scalars of each kernel that has them.
_SCALARS = {
    "sigmoid": {"scale": 1.0, "rate": 1.0, "shift": -0.5},
    "rbf": {"scale": 1.0, "rate": 1.0, "shift": -1.0},
}


@dataclass(frozen=True, kw_only=True)
class SnellOptions(KernelizedOptions):
    """Those of `snell`.

    Attributes:
        sparsity: s, the share of each matrix that is pruned, or shares by pattern; with `mode="released"` a
            weight whose share is 0 has no sparsifier.
        kernel: used instead of the distance.
        mode: the sparsifier.
    """

    sparsity: Sparsity = 0.4
    kernel: Literal["distance", "linear", "sigmoid", "rbf"] = "distance"
    mode: Literal["released", "paper", "hard"] = "released"

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for an option out of range."""
        super().require_valid(caller)
        one_of(caller, "kernel", self.kernel, ("distance", "linear", "sigmoid", "rbf"))
        one_of(caller, "mode", self.mode, ("released", "paper", "hard"))
        for level in self.shares.values():
            fraction(caller, "sparsity", level)

    @property
    def shares(self) -> Mapping[str, float]:
        """The share that is pruned by pattern."""
        return self.sparsity if isinstance(self.sparsity, Mapping) else {".*": self.sparsity}


@register(
    kind="adapter",
    paper="SNELL, Shen et al. 2024, arXiv 2411.01800",
    trains="r·(in + out)",
    backward_keeps="the input x (shared) and a threshold",
    conformance=Conformance(example={"rank": 2, "sparsity": 0.3, "coefficient": 2.0}, starts_as_base=False),
)
@takes(SnellOptions)
def snell(options: SnellOptions) -> Transform:
    """Sparse tuning with kernelized low-rank factors (arXiv 2411.01800).

    Raises:
        PeftError: here for an option out of range; in `init` for targets, ranks, layers or patterns that do
            not fit the parameters.
    """
    patterns = options.shares
    kernel_function = KernelFunction(options.kernel, options.coefficients, options.mode)

    def kernel_function_of(target: Target) -> tuple[KernelFunction, float]:
        share = pattern_value(target.path, patterns, None)
        if share is None:
            raise PeftError(f"snell: no pattern of sparsity matches {target.path!r}; add one, or exclude it")
        unsparsified = share == 0 and options.mode == "released"
        return (replace(kernel_function, mode="none") if unsparsified else kernel_function), float(share)

    def check(paths: list[str]) -> None:
        require_patterns_used("snell", patterns, paths)

    scalars = _SCALARS.get(options.kernel, {})
    return kernelized("snell", vars(options), kernel_function_of, check=check, start_of_scalars=scalars)


def set_sparsity(frozen: Frozen, sparsity: Sparsity) -> Frozen:
    """A copy of SNELL's frozen part, or of a chain's, that prunes another share; nothing is recompiled.

    Args:
        frozen: from `init`.
        sparsity: the share for every weight that has a sparsifier, or shares by pattern; weights that no
            pattern matches keep theirs.

    Raises:
        PeftError: a share lies outside [0, 1), a pattern matches no weight that has a sparsifier, or there is
            no such weight.
    """
    patterns = sparsity if isinstance(sparsity, Mapping) else {".*": sparsity}
    for share in patterns.values():
        fraction("set_sparsity", "sparsity", share)
    suffix = f"/{LEVEL}"
    levels = {
        name.removesuffix(suffix): level
        for name, level in tree.named_leaves(frozen.state).items()
        if name.endswith(suffix)
    }
    if not levels:
        raise PeftError("set_sparsity: no weight has a sparsifier; give snell a sparsity above 0")
    require_patterns_used("set_sparsity", patterns, list(levels))
    new = {
        f"{path}{suffix}": jnp.full_like(level, share)
        for path, level in levels.items()
        if (share := pattern_value(path, patterns, None)) is not None
    }
    return replace(frozen, state=tree.replace(frozen.state, new))
