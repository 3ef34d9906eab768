"""The rows of the memory tables: methods, and what their papers claim."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import peftjax as pj
from experiments.tuning.entrants import HEAD
from peftjax.models.backbone import Backbone


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        name: in the table.
        make: the method.
        remat: policy of the backbone.
        claim: what the paper says of memory.
        own_head: whether the method makes all that the loss reads, so that no head is trained beside it.
    """

    name: str
    make: Callable[[], pj.Transform]
    remat: str | None = None
    claim: str = ""
    own_head: bool = False

    def model(self, model: Backbone) -> Backbone:
        """The backbone under the row's policy."""
        return dataclasses.replace(model, remat=self.remat)

    def method(self, model: Backbone) -> pj.Transform:
        """The method and, of a classifier that it leaves alone, plain training of its last layer."""
        method = self.make()
        if self.name == "full" or self.own_head or model.head_name == "causal_lm":
            return method
        return pj.chain(method, pj.train(HEAD))


def coded(**options: int) -> pj.Transform:
    """LoRA on blocks that keep codes."""
    return pj.chain(pj.coded_residuals(**options), pj.lora())


LST_CLAIM = "69 % less in all than full"
MEFT_CLAIM = "84 % less activations than full"
ROWS = (
    Row("full", pj.full),
    Row("LoRA", pj.lora),
    Row("LoRA + remat", pj.lora, remat="nothing_saveable"),
    Row("LoRA + save_attention", pj.lora, remat="save_attention"),
    Row("LoRA + offload", pj.lora, remat="offload_attention"),
    Row("LoRA + 4-bit residuals", coded),
    Row("BitFit + 4-bit residuals", lambda: pj.chain(pj.coded_residuals(), pj.bitfit())),
    Row("S2A", pj.s2a, claim="about 4 times less in all than full"),
    Row("Houlsby", pj.houlsby),
    Row("Pfeiffer", pj.pfeiffer),
    Row("parallel adapter", pj.parallel_adapter),
    Row("AdaptFormer", pj.adaptformer),
    Row("prefix", lambda: pj.prefix(mlp_size=None)),
    Row("MAM", pj.mam),
)
