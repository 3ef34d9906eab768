"""Activated LoRA: an adapter that acts from its invocation on, and leaves the tokens before as they were.

Paper: Greenewald et al., "Activated LoRA: Fine-tuned LLMs for Intrinsics", 2025, arXiv 2504.12397.

    y_t = x_t·W + [t >= t0] · s · (x_t·aᵀ)·b      t0: where the last invocation of the row begins

Trained: a and b, r·(in + out) numbers a weight. Backward keeps x (shared) and x·aᵀ. The keys and values of
the tokens before the invocation are the base's, so that a cache of them serves all such adapters.
A row without the invocation is the base's. It cannot be merged. Start and scale as in LoRA.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jax import Array

from peftjax.backbone.rewriting import require_backbone, require_one_stack
from peftjax.core.errors import PeftError
from peftjax.methods._targets import Target
from peftjax.methods.lowrank._invocation import Telling, TellingEmbed
from peftjax.methods.lowrank._options import LoraOptions
from peftjax.methods.lowrank.lora import Wrap, low_rank
from peftjax.transform.frozen import Frozen, Params, Trainable
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Forward, Transform
from peftjax.weights.activated import activated
from peftjax.weights.base import Weight
from peftjax.weights.low_rank import LowRank

NAME = "alora"


@dataclass(frozen=True, kw_only=True)
class AloraOptions(LoraOptions):
    """Those of `lora`, and one more.

    Attributes:
        invocation_tokens: the ids of the tokens from which on the adapter acts.
    """

    invocation_tokens: Sequence[int]

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for an option out of range."""
        super().require_valid(caller)
        if not self.invocation_tokens or min(self.invocation_tokens) < 0:
            raise PeftError(
                f"{caller}: invocation_tokens must be the ids of one token or more, got "
                f"{list(self.invocation_tokens)}"
            )


@register(
    kind="adapter",
    paper="aLoRA, Greenewald et al. 2025, arXiv 2504.12397",
    trains="r·(in + out)",
    backward_keeps="the input x (shared) and x·aᵀ",
    mergeable=False,
    of_blocks=True,
    conformance=Conformance(
        example={"rank": 2, "alpha": 4.0, "invocation_tokens": [6], "targets": r"blocks/.*kernel"}
    ),
)
@takes(AloraOptions)
def alora(options: AloraOptions) -> Transform:
    """Low-rank adaptation of the tokens from an invocation on (arXiv 2504.12397).

    Raises:
        PeftError: as `lora`; in `init` and `model` for a model that is no decoder or encoder of peftjax; in
            `init` for a target that lies outside the blocks or is an expert's.
    """
    tokens = tuple(int(token) for token in options.invocation_tokens)
    name = ",".join(map(str, tokens))

    def wrapped(target: Target, weight: LowRank, slots: Mapping[str, Array]) -> Weight:
        return activated(weight, name)

    made = low_rank(
        NAME,
        options,
        options.start,
        rslora=options.rslora,
        wrap=Wrap(wrapped),
    )

    def init(key: Array, params: Params) -> tuple[Frozen, Trainable]:
        require_one_stack(NAME, params, "the invocation is found in the tokens of one stack")
        frozen, trainable = made.init(key, params)
        for target in frozen.plan:
            if not target.path.startswith("blocks/"):
                raise PeftError(
                    f"{NAME}: {target.path!r} lies outside the blocks, and is not told; exclude it"
                )
            if len(target.layout.stack) > 1:
                raise PeftError(f"{NAME}: {target.path!r} is of experts, which see other tokens; exclude it")
        return frozen, trainable

    def model(forward: Forward) -> Forward:
        backbone = require_backbone(NAME, forward)
        require_one_stack(NAME, backbone, "the invocation is found in the tokens of one stack")
        embed, stack = TellingEmbed(backbone.embed, tokens, name), Telling(backbone.stack, name)
        return dataclasses.replace(backbone, embed=embed, stack=stack)

    return dataclasses.replace(made, init=init, model=model)
