"""The methods that are compared, each with as many trained parameters as LoRA of one rank."""

from __future__ import annotations

import peftjax as pj
from experiments.tuning.entrants import Entrant, references
from peftjax.methods.sparse.shira import Mask


def entrants(rank: int, density: float) -> tuple[Entrant, ...]:
    """LoRA of a rank on all linear layers, what trains as many parameters, and reference points.

    DoRA trains the columns' lengths beside its factors: the feed-forward layers, about half of all numbers,
    get a rank less. PaCA trains the output side only, hence twice the rank; its scale is 1. The rank of SNELL
    and SNELLA is even, for two heads. What is not given is at the methods' defaults; SaRA selects again
    after half of the steps, as its authors do.

    Args:
        rank: of LoRA.
        density: the share of the entries of all linear weights that is as many numbers.
    """
    return (
        *references(),
        Entrant(f"LoRA r={rank}", lambda setting: pj.lora(rank=rank)),
        Entrant(
            f"DoRA r={rank}, {rank - 1}",
            lambda setting: pj.dora(rank=rank, rank_pattern={"up|down": rank - 1}),
        ),
        Entrant(f"SNELL r={rank}", lambda setting: pj.snell(rank=rank)),
        Entrant(f"SNELL r={rank}, no sparsifier", lambda setting: pj.snell(rank=rank, sparsity=0.0)),
        Entrant(f"SNELLA r={rank}", lambda setting: pj.snella(rank=rank, total_steps=setting.steps)),
        Entrant(f"PaCA r={2 * rank}", lambda setting: pj.paca(rank=2 * rank, alpha=2.0 * rank)),
        *(shira(rank, mask) for mask in ("random", "magnitude", "gradient", "snip")),
        Entrant(
            f"SaRA {density:.1%}",
            lambda setting: pj.sara(density=density, reselect_at=setting.steps // 2),
        ),
    )


def shira(rank: int, mask: Mask) -> Entrant:
    """SHiRA with as many entries as LoRA of a rank has numbers."""
    if mask in ("gradient", "snip"):
        return Entrant(
            f"SHiRA {mask}",
            lambda setting: pj.shira(rank=rank, mask=mask, gradients=setting.gradients()),
        )
    return Entrant(f"SHiRA {mask}", lambda setting: pj.shira(rank=rank, mask=mask))
