"""LT-SFT: train the entries that a full fine-tuning changed most; adapters of two trainings can be added.

Paper: Ansell et al., "Composable Sparse Fine-Tuning for Cross-Lingual Transfer", ACL 2022, arXiv 2110.07560.

    1. fine-tune all of θ₀ to θ₁     2. take the K entries of largest |θ₁ - θ₀| of the whole model
    3. from θ₀ again, train those entries alone:     θ = θ₀ + φ,  φ sparse
    of a language and a task:     θ = θ₀ + φ_language + φ_task      `pj.adapters.add`

Trained: K numbers, float32, zero at first. Backward keeps each adapted layer's input x, as full fine-tuning
does (an entry may need any column): what is saved is the optimizer's state. The threshold is one for all
targets, so that a matrix may have many entries or none. Default: 0.01 of them.
"""

from dataclasses import dataclass
from typing import Any

from peftjax.methods.sparse._together import EntryOptions, of_largest
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform


@dataclass(frozen=True, kw_only=True)
class LtSftOptions(EntryOptions):
    """Those of `lt_sft`.

    Attributes:
        changes: θ₁ - θ₀ of the targets, in a tree like the parameters or by path.
    """

    changes: Any = None


@register(
    kind="adapter",
    paper="LT-SFT, Ansell et al. 2022, arXiv 2110.07560",
    trains="K of the entries",
    backward_keeps="the input x",
    conformance=Conformance(example={"density": 0.1}),
)
@takes(LtSftOptions)
def lt_sft(options: LtSftOptions) -> Transform:
    """Train the entries that changed most (arXiv 2110.07560).

    Raises:
        PeftError: here for an option out of range; here and in `init` for targets or changes that do not fit
            the parameters.
    """
    return of_largest("lt_sft", options, options.changes)
