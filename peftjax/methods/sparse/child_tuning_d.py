"""Child-tuning_D: train the entries of largest Fisher information for the task.

Paper: Xu et al., "Raise a Child in Large Language Model: Towards Effective and Generalizable Fine-tuning",
EMNLP 2021, arXiv 2109.05687.

    F_i = mean over examples of (d log p(y|x) / d w_i)²      K entries of largest F of the whole model
    W' = W + S,  S zero but at them

Trained: K numbers, float32, zero at first. F is from `pj.calibrate.fisher_information`. The authors mask the
gradient of the whole model instead, which trains the same numbers and keeps the optimizer's state of all.
Backward keeps each adapted layer's input x. Default: 0.3 of the targets' entries.
"""

from dataclasses import dataclass
from typing import Any

from peftjax.methods.sparse._together import EntryOptions, of_largest
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform


@dataclass(frozen=True, kw_only=True)
class ChildOptions(EntryOptions):
    """Those of `child_tuning_d`.

    Attributes:
        fisher: F of the targets, in a tree like the parameters or by path.
        density: the share of all entries of the targets that is trained.
    """

    fisher: Any = None
    density: float = 0.3


@register(
    kind="adapter",
    paper="Child-tuning_D, Xu et al. 2021, arXiv 2109.05687",
    trains="K of the entries",
    backward_keeps="the input x",
    conformance=Conformance(example={}),
)
@takes(ChildOptions)
def child_tuning_d(options: ChildOptions) -> Transform:
    """Train the entries that matter most for the task (arXiv 2109.05687).

    Raises:
        PeftError: here for an option out of range; here and in `init` for targets or Fisher information that
            do not fit the parameters.
    """
    return of_largest("child_tuning_d", options, options.fisher)
