"""rsLoRA: LoRA with the scale that keeps learning stable as the rank grows.

Paper: Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", arXiv 2312.03732.

    s = alpha / √r   instead of   alpha / r

Everything else, what is trained and what backward keeps, is LoRA's.
"""

from peftjax.methods.lowrank._options import StartOptions
from peftjax.methods.lowrank.lora import low_rank
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform


@register(
    kind="adapter",
    paper="rsLoRA, Kalajdzievski 2023, arXiv 2312.03732",
    trains="r·(in + out)",
    backward_keeps="the input x (shared) and x·aᵀ",
    conformance=Conformance(example={"rank": 2, "alpha": 4.0}),
)
@takes(StartOptions)
def rslora(options: StartOptions) -> Transform:
    """Low-rank adaptation with the scale alpha / sqrt(rank) (arXiv 2312.03732).

    An alias of `lora(rslora=True)`, under the name of its paper.

    Raises:
        PeftError: as `lora`.
    """
    return low_rank("rslora", options, options.start, rslora=True)
