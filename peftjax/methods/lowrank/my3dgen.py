"""My3DGen: LoRA on all convolutions and linear layers of a generator, of rank r·k for windows of width k.

Paper: Qi et al., "My3DGen: A Scalable Personalized 3D Generative Model", WACV 2025, arXiv 2307.05468.

    W' = W + (alpha / r) · aᵀb      a [r·k, in·k·k], b [r·k, out]; of a linear layer k = 1

One adapter is a person, of a generator that all share. Trained: Σ r·k·(in·k² + out) numbers. Backward keeps
LoRA's residuals. Starts as LoRA. k is the width of the window's first axis. Defaults: the released code's
r = 1 and alpha = 1, on all that is called 'kernel' or 'weight'.
"""

import re
from dataclasses import dataclass, replace

from jax import Array

from peftjax.core.naming import is_convolution
from peftjax.core.targets import Targets, pattern_value
from peftjax.methods._targets import Target
from peftjax.methods.lowrank._factors import start_uniform
from peftjax.methods.lowrank._options import LowRankOptions
from peftjax.methods.lowrank.lora import low_rank
from peftjax.transform.frozen import Frozen, Params, Trainable
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform


@dataclass(frozen=True, kw_only=True)
class My3dgenOptions(LowRankOptions):
    """Those of `lora` but `init` and `rslora`, with the paper's defaults.

    Attributes:
        targets: as in `lora`; by default convolutions too.
        rank: r; that of a convolution is r times the width of its window, and at most its smaller side.
        alpha: numerator of the scale alpha / r.
    """

    targets: Targets = r".*(kernel|weight)"
    rank: int = 1
    alpha: float = 1.0


@register(
    kind="adapter",
    paper="My3DGen, Qi et al. 2025, arXiv 2307.05468",
    trains="r·k·(in + out)",
    backward_keeps="the input x (shared) and x·aᵀ",
    conformance=Conformance(example={"rank": 2, "alpha": 4.0}),
)
@takes(My3dgenOptions)
def my3dgen(options: My3dgenOptions) -> Transform:
    """Low-rank adaptation whose rank grows with the window of a convolution (arXiv 2307.05468).

    Raises:
        PeftError: as `lora`.
    """

    def init(key: Array, params: Params) -> tuple[Frozen, Trainable]:
        plan = options.find("my3dgen", params)
        widths = {target.path: _window(target) for target in plan}
        settled = replace(
            options,
            rank_pattern={_only(t.path): t.rank * widths[t.path] for t in plan},
            alpha_pattern={
                _only(path): pattern_value(path, options.alpha_pattern, options.alpha) * width
                for path, width in widths.items()
            },
        )
        return low_rank("my3dgen", settled, start_uniform, rslora=False).init(key, params)

    return replace(low_rank("my3dgen", options, start_uniform, rslora=False), init=init)


def _window(target: Target) -> int:
    """K of a convolution, and 1 of what is none."""
    sizes = target.layout.sizes("i")
    if not is_convolution(target.path, len(target.layout.axes)) or len(sizes) < 2:
        return 1
    # Channels come first in a parameter called 'weight', and else last.
    return sizes[1] if target.path.rsplit("/", 1)[-1] == "weight" else sizes[0]


def _only(path: str) -> str:
    """The pattern of one path alone."""
    return f"^{re.escape(path)}"
