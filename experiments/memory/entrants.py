"""The methods whose accuracy is compared: those of blocks beside LoRA and full fine-tuning."""

from __future__ import annotations

from collections.abc import Callable

import peftjax as pj
from experiments.tuning.entrants import Entrant, references


def entrants(rank: int, size: int) -> tuple[Entrant, ...]:
    """LoRA of a rank, and what trains as many parameters with bottlenecks; the others at their defaults.

    Prefixes are as long as the bottlenecks are wide and trained without an MLP: 2 D numbers each in a layer,
    as a unit of a bottleneck has. Side networks train what their widths give.

    Args:
        rank: of LoRA.
        size: of one bottleneck a layer that trains as many numbers; half of it where there are two.
    """
    half = size // 2
    return (
        *references(),
        Entrant(f"LoRA r={rank}", lambda setting: pj.lora(rank=rank)),
        Entrant(f"Houlsby {half}", lambda setting: pj.houlsby(size=half)),
        Entrant(f"Pfeiffer {size}", lambda setting: pj.pfeiffer(size=size)),
        Entrant(f"parallel adapter {size}", lambda setting: pj.parallel_adapter(size=size)),
        Entrant(f"AdaptFormer {size}", lambda setting: pj.adaptformer(size=size)),
        Entrant(f"prefix {size}", lambda setting: pj.prefix(length=size, mlp_size=None)),
        Entrant(f"MAM {half} + {half}", lambda setting: pj.mam(length=half, size=half, mlp_size=None)),
        Entrant(
            f"LoRA r={rank}, 4-bit residuals",
            lambda setting: pj.chain(pj.coded_residuals(), pj.lora(rank=rank)),
        ),
        beside("S2A", pj.s2a),
        beside("LST 1/8", pj.lst),
        Entrant(
            "LST 1/8, Fisher",
            lambda setting: pj.lst(init="fisher", scores=setting.fisher()),
            matched=False,
        ),
        *(
            Entrant(f"MEFT{variant} {half}", lambda setting, v=variant: pj.meft(variant=v, size=half))
            for variant in (1, 2, 3)
        ),
        beside("UniPT", pj.unipt),
        beside("SHERL", pj.sherl),
        beside("VQT", pj.vqt),
    )


def beside(label: str, make: Callable[[], pj.Transform]) -> Entrant:
    """A method whose number of parameters follows from the model's widths."""
    return Entrant(label, lambda setting: make(), matched=False)
