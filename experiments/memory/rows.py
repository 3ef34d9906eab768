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


ROWS = (
    Row("full", pj.full),
    Row("LoRA", pj.lora),
    Row("LoRA + remat", pj.lora, remat="nothing_saveable"),
)
