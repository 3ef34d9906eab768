"""The methods that are compared, each with as many parameters as LoRA of one rank."""

from __future__ import annotations

import peftjax as pj
from experiments.tuning.entrants import Entrant, references


def entrants(rank: int) -> tuple[Entrant, ...]:
    """LoRA of a rank on all linear layers, what trains as many parameters, and reference points.

    DoRA has its vectors of lengths beside the factors: the feed-forward layers, about half of all numbers,
    get a rank less.
    """
    return (
        *references(),
        Entrant(f"LoRA r={rank}", lambda setting: pj.lora(rank=rank)),
        Entrant(
            f"DoRA r={rank}, {rank - 1}",
            lambda setting: pj.dora(rank=rank, rank_pattern={"up|down": rank - 1}),
        ),
        Entrant(f"SNELL r={rank}", lambda setting: pj.snell(rank=rank)),
        Entrant(f"SNELL r={rank}, all entries", lambda setting: pj.snell(rank=rank, sparsity=0.0)),
        Entrant(f"SNELLA r={rank}", lambda setting: pj.snella(rank=rank, total_steps=setting.steps)),
    )
