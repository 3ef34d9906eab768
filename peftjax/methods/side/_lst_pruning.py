"""Structural pruning of a backbone's blocks to a part of their width: where a side network starts.

Of n numbers along an axis, `n - round((1 - 1/r) n)` are kept, those with the largest scores (of equal ones
the first), in ascending order. The residual numbers that are kept change from sublayer to sublayer ("pruning
without residual"), in the order of the computation and through all layers, used or not:

    embeddings    the columns with the largest sum of scores begin the kept set
    q, k, v       inputs: the kept set; outputs: by the sum over those inputs of the product F_q F_k F_v
    o             inputs: the outputs of q, k, v; outputs by their own scores: the new kept set
    up (, gate)   as q, k, v;   down: as o
    norms         the kept set where they stand
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Part = dict[str, Any]
Kept = Int[Array, " d"]
PROJECTIONS = ("query", "key", "value")


@dataclass(frozen=True)
class Rules:
    """What decides how a stack is pruned.

    Attributes:
        reduction: r.
        rotary: whether its positions are rotary.
        post_norm: whether its norms come after the residual sum.
    """

    reduction: int
    rotary: bool
    post_norm: bool


def kept_count(size: int, reduction: int) -> int:
    """How many of `size` are kept."""
    return size - round((1 - 1 / reduction) * size)


def largest(scores: Float[Array, " n"], reduction: int) -> Kept:
    """The places of the largest scores, in ascending order."""
    _, places = jax.lax.top_k(scores, kept_count(scores.shape[0], reduction))
    return jnp.sort(places)


def prune_stack(blocks: Part, scores: Part, kept: Kept, encoded: Kept, rules: Rules) -> tuple[Part, Kept]:
    """All blocks of a stack pruned, and the kept set after the last.

    Args:
        blocks: their parameters, each leaf [L, ...].
        scores: of the same structure, not negative; those of kernels are read.
        kept: the kept set before the first block.
        encoded: that of what cross-attention reads; `kept` where there is none.
        rules: how.
    """

    def body(kept: Kept, layer: tuple[Part, Part]) -> tuple[Kept, Part]:
        return _prune_block(*layer, kept, encoded, rules)

    last, pruned = jax.lax.scan(body, kept, (blocks, scores))
    return pruned, last


def _prune_block(layer: Part, scores: Part, kept: Kept, encoded: Kept, rules: Rules) -> tuple[Kept, Part]:
    pruned: Part = {}
    for branch in ("attention", "cross_attention", "feed_forward"):
        if branch not in layer:
            continue
        before = kept
        if branch == "feed_forward":
            pruned[branch], kept = _prune_feed_forward(layer[branch], scores[branch], before, rules)
        else:
            source = encoded if branch == "cross_attention" else before
            pruned[branch], kept = _prune_attention(layer[branch], scores[branch], before, source, rules)
        places = {"norm": kept if rules.post_norm else before, "post_norm": kept}
        for norm, place in places.items():
            if f"{branch}_{norm}" in layer:
                pruned[f"{branch}_{norm}"] = {n: leaf[place] for n, leaf in layer[f"{branch}_{norm}"].items()}
    return kept, pruned


def _prune_attention(part: Part, scores: Part, kept: Kept, source: Kept, rules: Rules) -> tuple[Part, Kept]:
    fused = "qkv" in part
    if fused:
        part, scores = _split(part), _split(scores)
    inputs = {"query": kept, "key": source, "value": source}
    widths = {name: part[name]["kernel"].shape[1] for name in PROJECTIONS}
    if rules.rotary or widths["key"] != widths["query"]:
        outputs = {name: jnp.arange(0, widths[name], rules.reduction) for name in PROJECTIONS}
    else:
        outputs = dict.fromkeys(PROJECTIONS, _best_outputs(scores, inputs, rules.reduction))
    pruned = {name: _cut(part[name], inputs[name], outputs[name]) for name in PROJECTIONS}
    after = largest(scores["output"]["kernel"][outputs["query"]].sum(0), rules.reduction)
    pruned["output"] = _cut(part["output"], outputs["query"], after)
    for norm in ("query_norm", "key_norm"):
        if norm in part:
            pruned[norm] = {name: leaf[:: rules.reduction] for name, leaf in part[norm].items()}
    return _joined(pruned) if fused else pruned, after


def _prune_feed_forward(part: Part, scores: Part, kept: Kept, rules: Rules) -> tuple[Part, Kept]:
    inputs = {name: kept for name in ("gate", "up") if name in part}
    inner = _best_outputs(scores, inputs, rules.reduction)
    pruned = {name: _cut(part[name], kept, inner) for name in inputs}
    after = largest(scores["down"]["kernel"][inner].sum(0), rules.reduction)
    return {**pruned, "down": _cut(part["down"], inner, after)}, after


def _best_outputs(scores: Part, inputs: dict[str, Kept], reduction: int) -> Kept:
    """The outputs that several kernels keep together."""
    product = 1.0
    for name, kept in inputs.items():
        own = scores[name]["kernel"][kept]
        # Three squared gradients may have no product in float32; a factor changes no order.
        product *= own / jnp.maximum(own.max(), jnp.finfo(own.dtype).tiny)
    return largest(product.sum(0), reduction)


def _cut(linear: Part, inputs: Kept, outputs: Kept) -> Part:
    cut = {"kernel": linear["kernel"][inputs[:, None], outputs]}
    return {**cut, "bias": linear["bias"][outputs]} if "bias" in linear else cut


def _split(part: Part) -> Part:
    """The fused kernel `qkv` as three."""
    queries = part["output"]["kernel"].shape[0]
    keys = (part["qkv"]["kernel"].shape[1] - queries) // 2
    places = (queries, queries + keys)
    apart = {name: jnp.split(leaf, places, axis=-1) for name, leaf in part["qkv"].items()}
    three = {
        name: {leaf: parts[number] for leaf, parts in apart.items()}
        for number, name in enumerate(PROJECTIONS)
    }
    return {**{name: own for name, own in part.items() if name != "qkv"}, **three}


def _joined(part: Part) -> Part:
    """Undo `_split`."""
    three = [part[name] for name in PROJECTIONS]
    qkv = {leaf: jnp.concatenate([own[leaf] for own in three], axis=-1) for leaf in three[0]}
    return {**{name: own for name, own in part.items() if name not in PROJECTIONS}, "qkv": qkv}
