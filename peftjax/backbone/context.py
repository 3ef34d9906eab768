"""What `embed` hands to every block of a stack and to the head: masks, positions and the like."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from jaxtyping import Array, Bool, Float, Int

from peftjax.backbone.attention import Prefix
from peftjax.quantize.activations import LogSqrt2

Rotation = tuple[Float[Array, "#B S h"], Float[Array, "#B S h"]]
"""Cosine and sine of every position's angles, in float32; h is half of a head's width."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """What the blocks of a stack share, None where a model has no such thing; change it with `replace`.

    Attributes:
        mask: [B, K], True where a key is a token: of the S tokens, with a cache of its T slots. None is all.
        segments: [B, S]; a token sees only those of its own segment.
        bias: [1, N, Q, K], added to the scores of attention, of the queries and keys at hand.
        side_bias: as `bias`, for the blocks of a side network with a table of its own (LST).
        rotation: of queries and keys, where positions are rotary.
        local_rotation: another one, which the layers with `local` read.
        last: [B], the place of each row's last token.
        encoded: what the encoder gave, [B, S, D]; of LST both its networks' states.
        encoded_mask: [B, S], the mask of `encoded`.
        cache_index: the slot of the first token in the cache; None where there is no cache. A Python int
            lets attention skip the keys that are not seen from there.
        layer: the number of the layer.
        window: how many places back the layer sees; None is `BlockConfig.window`.
        local: whether the layer reads `local_rotation`.
        attended: [B, S, D], the stream of the tokens, where a block is given queries beside them.
        prefix: further keys and values that every query of a branch sees, as they are: not normed, not
            rotated, in no slot of the cache.
        weight_codes: what a layer's attention weights are rounded to; None rounds nothing.
        active: [B, S], True where an adapter acts that acts on some tokens alone, by its invocation.
    """

    mask: Bool[Array, "B K"] | None = None
    segments: Int[Array, "B S"] | None = None
    bias: Float[Array, "1 N Q K"] | None = None
    side_bias: Float[Array, "1 N Q K"] | None = None
    rotation: Rotation | None = None
    local_rotation: Rotation | None = None
    last: Int[Array, " B"] | None = None
    encoded: Any = None
    encoded_mask: Bool[Array, "B E"] | None = None
    cache_index: int | Int[Array, ""] | None = None
    layer: int | Int[Array, ""] | None = None
    window: int | Int[Array, ""] | None = None
    local: Bool[Array, ""] | None = None
    attended: Float[Array, "B S D"] | None = None
    prefix: Prefix | None = None
    weight_codes: LogSqrt2 | None = None
    active: Mapping[str, Bool[Array, "B S"]] | None = None
