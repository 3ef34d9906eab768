"""The rows of the memory tables: methods, and what their papers claim."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Literal

import peftjax as pj
from peftjax.backbone.backbone import Backbone, Params
from peftjax.train.new_head import with_new_head


@dataclasses.dataclass(frozen=True)
class Claim:
    """That a method needs a share less than full fine-tuning.

    Attributes:
        share: how much less.
        of: "kept", the activations, or "peak", all.
    """

    share: float
    of: Literal["kept", "peak"]

    def __str__(self) -> str:
        """A few words for a table."""
        return f"{self.share:.0%} less {'activations' if self.of == 'kept' else 'in all'} than full"


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        name: in the table.
        make: the method.
        remat: policy of the backbone.
        claim: what the paper says of memory, beside full fine-tuning.
        own_head: whether the method makes all that the loss reads, so that no head is trained beside it.
    """

    name: str
    make: Callable[[], pj.Transform]
    remat: str | None = None
    claim: Claim | None = None
    own_head: bool = False

    def model(self, model: Backbone) -> Backbone:
        """The backbone under the row's policy."""
        return dataclasses.replace(model, remat=self.remat)

    def method(self, model: Backbone, params: Params) -> pj.Transform:
        """The method and, of a classifier that it leaves alone, plain training of what the task adds."""
        return self.make() if self.own_head else with_new_head(self.make(), model, params)


def coded(**options: int) -> pj.Transform:
    """LoRA on blocks that keep codes."""
    return pj.chain(pj.coded_residuals(**options), pj.lora())


def every_second() -> pj.Transform:
    """LST on the layers that the authors use of T5-large, which has 24."""
    return pj.lst(side_layers=range(1, 24, 2))


LST_CLAIM = Claim(0.69, "peak")
MEFT_CLAIM = Claim(0.84, "kept")
S2A_CLAIM = Claim(0.75, "peak")
ROWS = (
    Row("full", pj.full),
    Row("LoRA", pj.lora),
    Row("LoRA + remat", pj.lora, remat="nothing_saveable"),
    Row("LoRA + save_attention", pj.lora, remat="save_attention"),
    Row("LoRA + offload", pj.lora, remat="offload_attention"),
    Row("LoRA + 4-bit residuals", coded),
    Row("BitFit + 4-bit residuals", lambda: pj.chain(pj.coded_residuals(), pj.bitfit())),
    Row("S2A", pj.s2a, claim=S2A_CLAIM),
    Row("Houlsby", pj.houlsby),
    Row("Pfeiffer", pj.pfeiffer),
    Row("parallel adapter", pj.parallel_adapter),
    Row("AdaptFormer", pj.adaptformer),
    Row("prefix", lambda: pj.prefix(mlp_size=None)),
    Row("MAM", pj.mam),
    Row("LST 1/8", pj.lst, claim=LST_CLAIM),
    Row("LST 1/8, every second layer", every_second, claim=LST_CLAIM),
    *(Row(f"MEFT{v}", partial(pj.meft, variant=v), claim=MEFT_CLAIM) for v in (1, 2, 3)),
    *(
        Row(f"MEFT{v}, no anchors", partial(pj.meft, variant=v, anchor_every=0), claim=MEFT_CLAIM)
        for v in (1, 2, 3)
    ),
    Row("UniPT", pj.unipt),
    Row("SHERL", pj.sherl),
    Row("VQT", pj.vqt, own_head=True),
    Row("VQT, two passes", partial(pj.vqt, passes=2), own_head=True),
)
