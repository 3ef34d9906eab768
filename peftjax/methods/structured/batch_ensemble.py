"""BatchEnsemble: k models in one pass, each the shared weights rescaled by two vectors of its own.

Papers: Wen et al., "BatchEnsemble: An Alternative Approach to Efficient Ensemble and Lifelong Learning", ICLR
2020, arXiv 2002.06715; Gorishniy et al., "TabM: Advancing Tabular Deep Learning with Parameter-Efficient
Ensembling", ICLR 2025, arXiv 2410.24210.

    y = ((x ∘ r_i)·W) ∘ s_i + c_i      r [k, in], s, c [k, out], member i has the weight W ∘ (r_i s_iᵀ)

Trained: k·(in + 2·out) numbers a weight; W stays. The batch has the rows of member 1 first, then those of
member 2, and so on: `jnp.tile` a batch for all, or give each rows of its own. Its mean loss is the mean of
the members' losses. Backward keeps x, and y before it is scaled. r = 1 + noise · N(0, 1), or members that see
the same rows would never part; s = 1, c = 0. Defaults: noise 0.1 is ours, k = 32 TabM's. Weight decay would
pull r and s to 0: leave it off.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from peftjax.core import tree
from peftjax.core.checks import at_least, positive
from peftjax.core.errors import PeftError
from peftjax.core.naming import is_of_experts
from peftjax.methods._options import TargetOptions
from peftjax.methods._targets import Target, all_layers
from peftjax.methods._weights import Slots, of_weights
from peftjax.transform.frozen import Frozen, Params, Trainable
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform
from peftjax.weights.ensembled import Ensembled


@dataclass(frozen=True, kw_only=True)
class BatchEnsembleOptions(TargetOptions):
    """Those of `batch_ensemble`.

    Attributes:
        members: k.
        noise: deviation of the input's scales at first.
        biases: whether members have biases of their own, beside the layer's, which cannot be merged.
    """

    members: int = 32
    noise: float = 0.1
    biases: bool = True

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for an option out of range."""
        super().require_valid(caller)
        positive(caller, "members", self.members)
        at_least(caller, "noise", self.noise, 0.0)


@register(
    kind="adapter",
    paper="BatchEnsemble and TabM, Wen et al. 2020, Gorishniy et al. 2025, arXiv 2002.06715, 2410.24210",
    trains="k·(in + 2·out)",
    backward_keeps="x and x·W",
    conformance=Conformance(
        example={
            "members": 1,
            "biases": False,
            "targets": r"(.*/)?(up|down|query|key|value|out|head)/kernel",
        },
        starts_as_base=False,
    ),
)
@takes(BatchEnsembleOptions)
def batch_ensemble(options: BatchEnsembleOptions) -> Transform:
    """An ensemble on one set of weights, each member with scales of its own (arXiv 2002.06715, 2410.24210).

    Raises:
        PeftError: here for an option out of range; in `init` for targets that do not fit the parameters or
            are of experts; where a layer sees a batch that the members do not divide, or several are to
            be merged.
    """

    def start(key: Array, target: Target, base: Any) -> tuple[Slots, Slots]:
        if is_of_experts(target.path):
            raise PeftError(
                f"batch_ensemble: {target.path!r} is of experts, whose tokens are not in the "
                "order of the batch; exclude it"
            )
        (n, m), k = target.layout.matrix, options.members
        gains = 1.0 + options.noise * jax.random.normal(key, (*target.stack, k, n))
        slots = {"input": gains, "output": jnp.ones((*target.stack, k, m))}
        return (slots | {"shift": jnp.zeros((*target.stack, k, m))} if options.biases else slots), {}

    def weight(target: Target, base: Any, slots: Mapping[str, Array], keys: Array | None) -> Ensembled:
        return Ensembled(base, slots["input"], slots["output"], target.layout, slots.get("shift"))

    return of_weights(
        "batch_ensemble", options, start, weight, neutral={"input": 1.0, "output": 1.0}, one_way=True
    )


def member_of(frozen: Frozen, trainable: Trainable, number: int) -> Params:
    """The plain parameters of one member of a `batch_ensemble`.

    Args:
        frozen: of the method.
        trainable: what it has trained.
        number: of the member, from 0.

    Raises:
        PeftError: there is no such member, or it has a bias of its own where the model has none.
    """
    members = next(iter(trainable.values()))["input"].shape[-2]
    if not 0 <= number < members:
        raise PeftError(f"member_of: there is no member {number} of {members}; the first one is 0")
    own = {
        path: {name: value[..., number : number + 1, :] for name, value in slots.items() if name != "shift"}
        for path, slots in trainable.items()
    }
    merged = batch_ensemble(members=1, biases=False).merge(frozen, own)
    leaves, shifted = tree.named_leaves(merged), {}
    biases = {tree.module_of(path): path for path in tree.biases(leaves)}
    for target in frozen.plan:
        if "shift" not in trainable[target.path]:
            continue
        path = biases.get(tree.module_of(target.path))
        if path is None:
            raise PeftError(
                f"member_of: the layer of {target.path!r} has no bias, and its members have; make the "
                "ensemble with biases=False"
            )
        shift = all_layers(trainable[target.path]["shift"][..., number, :], target)
        bias = leaves[path]
        shifted[path] = (bias + shift.reshape(bias.shape)).astype(bias.dtype)
    return tree.replace(merged, shifted)
