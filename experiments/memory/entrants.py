"""The methods whose accuracy is compared: those of blocks beside LoRA and full fine-tuning."""

from __future__ import annotations

import peftjax as pj
from experiments.tuning.entrants import Entrant, references


def entrants(rank: int, size: int) -> tuple[Entrant, ...]:
    """LoRA of a rank, bottlenecks of a size, and the others at their defaults.

    What they train is as different as what they keep: no number of parameters is common to them.

    Args:
        rank: of LoRA.
        size: of the bottlenecks.
    """
    return (
        *references(),
        Entrant(f"LoRA r={rank}", lambda setting: pj.lora(rank=rank)),
        Entrant(f"Pfeiffer {size}", lambda setting: pj.pfeiffer(size=size), matched=False),
    )
