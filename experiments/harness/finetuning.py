"""The contenders of the fine-tuning experiments, each with as many trained parameters as LoRA of one rank."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import peftjax as pj
from experiments.harness.contenders import Contender
from experiments.harness.quantized_bases import BASES
from peftjax.methods.sparse.shira import Mask

Group = Literal["plain", "blocks", "sparse", "quantized"]
"""LoRA and the reference points alone; or beside them methods of blocks, sparse ones, or bases of codes."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes at which all matched contenders train as many parameters, for one model."""

    rank: int
    """Of LoRA."""
    size: int
    """Of one bottleneck a layer; half of it where there are two."""
    density: float
    """Share of the entries of all linear weights."""


def contenders(chosen: Group, sizes: Sizes) -> tuple[Contender, ...]:
    """The contenders of a set, the reference points first."""
    lora = Contender(f"LoRA r={sizes.rank}", lambda setting: pj.lora(rank=sizes.rank))
    others = {"plain": (), "blocks": blocks(sizes), "sparse": sparse(sizes), "quantized": quantized(sizes)}
    return (*references(), lora, *others[chosen])


def references() -> tuple[Contender, ...]:
    """What any method is compared with, whatever it trains: all, the biases, nothing but the head."""
    return (
        Contender("full", lambda setting: pj.full(), matched=False),
        Contender("bitfit", lambda setting: pj.bitfit(), matched=False),
        Contender("head only", lambda setting: pj.unfreeze(["head/classifier"]), matched=False),
    )


def blocks(sizes: Sizes) -> tuple[Contender, ...]:
    """Methods of blocks.

    Prefixes are as long as the bottlenecks are wide and trained without an MLP: 2 D numbers each in a layer,
    as a unit of a bottleneck has. Side networks train what their widths give.
    """
    rank, size = sizes.rank, sizes.size
    half = size // 2
    return (
        Contender(f"Houlsby {half}", lambda setting: pj.houlsby(size=half)),
        Contender(f"Pfeiffer {size}", lambda setting: pj.pfeiffer(size=size)),
        Contender(f"parallel adapter {size}", lambda setting: pj.parallel_adapter(size=size)),
        Contender(f"AdaptFormer {size}", lambda setting: pj.adaptformer(size=size)),
        Contender(f"prefix {size}", lambda setting: pj.prefix(length=size, mlp_size=None)),
        Contender(f"MAM {half} + {half}", lambda setting: pj.mam(length=half, size=half, mlp_size=None)),
        Contender(
            f"LoRA r={rank}, 4-bit residuals",
            lambda setting: pj.chain(pj.coded_residuals(), pj.lora(rank=rank)),
        ),
        _of_widths("S2A", pj.s2a),
        _of_widths("LST 1/8", pj.lst),
        Contender(
            "LST 1/8, Fisher",
            lambda setting: pj.lst(init="fisher", scores=setting.fisher()),
            matched=False,
        ),
        *(
            Contender(f"MEFT{variant} {half}", lambda setting, v=variant: pj.meft(variant=v, size=half))
            for variant in (1, 2, 3)
        ),
        _of_widths("UniPT", pj.unipt),
        _of_widths("SHERL", pj.sherl),
        _of_widths("VQT", pj.vqt),
    )


def _of_widths(label: str, make: Callable[[], pj.Transform]) -> Contender:
    """A method whose number of parameters follows from the model's widths."""
    return Contender(label, lambda setting: make(), matched=False)


def sparse(sizes: Sizes) -> tuple[Contender, ...]:
    """Sparse methods and DoRA.

    DoRA trains the columns' lengths beside its factors: the feed-forward layers, about half of all numbers,
    get a rank less. PaCA trains the output side only, hence twice the rank; its scale is 1. The rank of SNELL
    and SNELLA is even, for two heads. What is not given is at the methods' defaults; SaRA selects anew
    after half of the steps, as its authors do.
    """
    rank, density = sizes.rank, sizes.density
    return (
        Contender(
            f"DoRA r={rank}, {rank - 1}",
            lambda setting: pj.dora(rank=rank, rank_pattern={"up|down": rank - 1}),
        ),
        Contender(f"SNELL r={rank}", lambda setting: pj.snell(rank=rank)),
        Contender(f"SNELL r={rank}, no sparsifier", lambda setting: pj.snell(rank=rank, sparsity=0.0)),
        Contender(f"SNELLA r={rank}", lambda setting: pj.snella(rank=rank, total_steps=setting.steps)),
        Contender(f"PaCA r={2 * rank}", lambda setting: pj.paca(rank=2 * rank, alpha=2.0 * rank)),
        *(shira(rank, mask) for mask in ("random", "magnitude", "gradient", "snip")),
        Contender(
            f"SaRA {density:.1%}",
            lambda setting: pj.sara(density=density, reselect_at=setting.steps // 2),
        ),
    )


UNTUNED = ("power_of_two", "statsq4", "bcq3")
"""Formats between two others, which are left out where every format is tuned."""


def quantized(sizes: Sizes) -> tuple[Contender, ...]:
    """LoRA on bases of codes, and methods made for them."""
    rank = sizes.rank
    on_codes = (
        Contender(
            f"LoRA r={rank}, {name}", lambda setting, make=BASES[name]: pj.chain(make(), pj.lora(rank=rank))
        )
        for name in BASES
        if name not in UNTUNED
    )
    return (
        *on_codes,
        Contender(f"LoftQ r={rank}", lambda setting: pj.loftq(rank=rank)),
        Contender(f"QPaCA r={2 * rank}", lambda setting: pj.qpaca(rank=2 * rank)),
        Contender(f"QA-LoRA r={rank}", lambda setting: pj.qa_lora(rank=rank), matched=False),
        Contender("PEQA int4", lambda setting: pj.peqa(format="int4"), matched=False),
    )


def shira(rank: int, mask: Mask) -> Contender:
    """SHiRA with as many entries as LoRA of a rank has numbers."""
    if mask in ("gradient", "snip"):
        return Contender(
            f"SHiRA {mask}",
            lambda setting: pj.shira(rank=rank, mask=mask, gradients=setting.gradients()),
        )
    return Contender(f"SHiRA {mask}", lambda setting: pj.shira(rank=rank, mask=mask))
