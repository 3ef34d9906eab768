"""UniPT: one parallel network that reads every layer of a frozen backbone, in no order.

Diao et al. 2024, arXiv 2308.14316. From the states H_0 ... H_L [B, S, D] of the embeddings and the layers,
with d = D / factor:

    T_l = LN(H_l W_l + b_l)  [B, S, d]            A_l = relu(Q T_l^T) over visible keys, rows over their sum
    Q   = T_L                                     R   = Σ_l c_l (A_l + I) T_l
    c   = softmax_l( w · (mean(Q) * mean(T_l)) )  l = 0 ... L-1;  the means over visible tokens
    out = relu(Q + LN(R W + b)) W_up + b_up  [B, S, D]            what the model's head reads

Other released task trees: `_unipt_network.Variant`. Trained: all of that, D d + d (+ 2 d) a layer. Backward
keeps H_l and T_l of every layer, D + d numbers a token, and Q, R; A_l is recomputed. Nothing in the backbone
is kept, or can be trained beside it.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from peftjax.backbone.backbone import Backbone, Stack
from peftjax.backbone.context import Context
from peftjax.backbone.functional import linear_init, norm_init
from peftjax.backbone.protocols import Cache, DropoutKey
from peftjax.backbone.rewriting import (
    require_backbone,
    require_one_stack,
    require_scan,
    stacks_of,
)
from peftjax.core.checks import one_of, positive
from peftjax.core.errors import PeftError
from peftjax.methods.side._layer_states import (
    states_of,
    states_of_cached,
    visible_tokens,
)
from peftjax.methods.side._unipt_network import (
    VARIANTS,
    Variant,
    aggregate,
    confidence,
    narrow_states,
    output,
)
from peftjax.transform.frozen import Frozen, Params, Trainable
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Forward, GradientCut, Transform

NAME = "unipt"


@register(
    kind="adapter",
    paper="UniPT: universal parallel tuning, Diao et al. 2024, arXiv 2308.14316",
    trains="(D + 3) d a layer, and 2 D d + d² for all, d = D / factor",
    backward_keeps="D + d numbers a token and layer beside the blocks, nothing in them",
    mergeable=False,
    of_blocks=True,
    conformance=Conformance(example={"factor": 2}, starts_as_base=False),
)
def unipt(*, factor: int = 2, variant: str = "vse") -> Transform:
    """A parallel network beside the frozen backbone, whose output goes to its head (arXiv 2308.14316).

    `out = relu(Q + LN(R W + b)) W_up + b_up`, R = Σ_l c_l (A_l + I) T_l.

    Args:
        factor: d = D / factor is the network's width.
        variant: "vse", "clip4clip" or "clip_vil".

    Raises:
        PeftError: for a setting out of range; in `init` and `model`, for what is not a backbone with one
            stack of blocks.
    """
    one_of(NAME, "variant", variant, VARIANTS)
    positive(NAME, "factor", factor)
    kind = VARIANTS[variant]

    def init(key: Array, params: Params) -> tuple[Frozen, Trainable]:
        stack = stacks_of(NAME, params)[0]
        _require_one_stack(params)
        width, inner = stack.width, stack.width // factor
        if not inner:
            raise PeftError(f"{NAME}: factor {factor} is larger than the model's width {width}")
        keys = jax.random.split(key, 5)
        trainable = {
            "down": linear_init(keys[0], (stack.num_layers, width, inner)),
            "last": linear_init(keys[1], (width, inner)),
            "confidence": linear_init(keys[2], (inner, 1))["kernel"][:, 0],
            "up": linear_init(keys[3], (inner, width)),
        }
        return Frozen(params), trainable | _own_parts(kind, keys[4], stack.num_layers, width, inner)

    def apply(frozen: Frozen, trainable: Trainable, *, key: Array | None = None) -> Params:
        return {**frozen.params, NAME: trainable}

    def model(forward: Forward) -> Forward:
        backbone = require_backbone(NAME, forward)
        require_scan(NAME, backbone)
        _require_one_stack(backbone)
        return dataclasses.replace(backbone, stack=ParallelStack(kind, backbone.stack))

    cut = GradientCut("use pj.sherl, which trains the last layer too")
    return Transform(NAME, {}, init, apply, model, cut=cut)


def _own_parts(kind: Variant, key: Array, layers: int, width: int, inner: int) -> Trainable:
    """The parameters that not every variant has."""
    first, second = jax.random.split(key)
    if kind.of_clip:
        return {"anchor": linear_init(first, (width, inner))}
    wide = width if kind.projection == "bottleneck" else inner
    project = {"linear": linear_init(first, (inner, wide)), "norm": norm_init((inner,))}
    if kind.projection == "bottleneck":
        project["contract"] = linear_init(second, (wide, inner))
    return {"down_norm": norm_init((layers, inner)), "last_norm": norm_init((inner,)), "project": project}


@dataclasses.dataclass(frozen=True)
class ParallelStack:
    """The frozen blocks and the network beside them, whose output is what the head reads.

    Attributes:
        kind: the network's form.
        inner: the stack as it was, which knows the blocks' cache.
    """

    name: ClassVar[str] = NAME
    kind: Variant
    inner: Stack

    def run(
        self,
        model: Backbone,
        params: Params,
        hidden: Float[Array, "B S D"],
        context: Context,
        key: DropoutKey,
    ) -> Float[Array, "B S D"]:
        """`out`; the blocks drop out as they do alone."""
        own = params[NAME]
        last, states = states_of(model, params, hidden, context, key)
        anchor, tokens = narrow_states(self.kind, own, last, states)
        visible = visible_tokens(model, context, hidden.shape[1], hidden.shape[1])
        shares = confidence(own["confidence"], anchor, tokens, visible, own_anchor=self.kind.of_clip)
        mixed = aggregate(anchor, tokens, tokens, shares, visible, self.kind.smallest_sum)
        return output(self.kind, own, last, anchor, mixed)

    def empty_cache(
        self, model: Backbone, params: Params, hidden: Float[Array, "B S D"], context: Context
    ) -> dict[str, Any]:
        """The blocks' cache, and zeros for T_l [n, B, T, d] and, where its mean is read, Q [B, T, d]."""
        inner, slots = params[NAME]["confidence"].shape[0], context.mask.shape[1]
        count = model.num_layers + self.kind.of_clip
        cache = {
            "blocks": self.inner.empty_cache(model, params, hidden, context),
            "tokens": jnp.zeros((count, len(hidden), slots, inner), hidden.dtype),
        }
        if not self.kind.of_clip:
            cache["anchor"] = jnp.zeros((len(hidden), slots, inner), hidden.dtype)
        return cache

    def run_cached(
        self, model: Backbone, params: Params, hidden: Float[Array, "B S D"], context: Context, cache: Cache
    ) -> tuple[Float[Array, "B S D"], dict[str, Any]]:
        """`run` for further tokens."""
        own, length = params[NAME], hidden.shape[1]
        last, blocks, states = states_of_cached(model, params, hidden, context, cache["blocks"])
        anchor, tokens = narrow_states(self.kind, own, last, states)

        def written(slots: Array, new: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(slots, new, context.cache_index, slots.ndim - 2)

        further, keys = {"blocks": blocks}, written(cache["tokens"], tokens)
        visible = visible_tokens(model, context, length, keys.shape[2])
        anchors = anchor
        if not self.kind.of_clip:
            further["anchor"] = anchors = written(cache["anchor"], anchor)
        shares = confidence(own["confidence"], anchors, keys, visible, own_anchor=self.kind.of_clip)
        mixed = aggregate(anchor, tokens, keys, shares, visible, self.kind.smallest_sum)
        return output(self.kind, own, last, anchor, mixed), {**further, "tokens": keys}


def _require_one_stack(owner: Backbone | Params) -> None:
    require_one_stack(NAME, owner, "its form for two stacks was never released")
