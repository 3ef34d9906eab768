"""RePaViT: most inner features of each feed-forward skip the activation, so that they can be merged away.

Paper: Xu et al., "RePaViT: Scalable Vision Transformer Acceleration via Structural Reparameterization on
Feedforward Network Layers", ICML 2025, arXiv 2505.21847.

    z = x·W1 + b1 [F]     y = [f(z_a), z_i]·W2 + b2      a the k = ⌈F (1 - idle)⌉ first features, i others
    merged:      y = x·R + r + f(x·W1_a + b1_a)·W2_a      R = W1_i·W2_i [D, D], r = b1_i·W2_i + b2

Idle features skip a gate too, where there is one. It goes beside a method that trains, such as
`pj.chain(pj.full(), pj.repavit())`, and trains nothing. The merged feed-forward, `pj.repavit_merged`, has
D² + 2 D k numbers for 2 D F: 3/8 of them with F = 4 D and the paper's idle = 0.75. Backward keeps what the
model keeps. A trained model is another one with it, and needs training.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from peftjax.backbone.backbone import Backbone
from peftjax.backbone.rewriting import require_backbone, require_one_stack, rewrite_stacks, stacks_of
from peftjax.core.errors import PeftError
from peftjax.transform.frozen import Frozen, Params, Trainable
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Forward, Transform

NAME = "repavit"
_WHY = "two stacks have no features in common"
_STATE = "blocks/feed_forward"


@register(
    kind="companion",
    paper="RePaViT, Xu et al. 2025, arXiv 2505.21847",
    trains="nothing",
    backward_keeps="nothing more",
    mergeable=False,
    of_blocks=True,
    conformance=Conformance(example={"idle": 0.5}, starts_as_base=False),
)
def repavit(*, idle: float = 0.75) -> Transform:
    """Let a share of each feed-forward's inner features skip the activation (arXiv 2505.21847).

    Args:
        idle: the share, theta.

    Raises:
        PeftError: for a share that is not in [0, 1]; in `init` and `model`, for what is not a backbone of one
            stack, or one with experts.
    """
    if not 0.0 <= idle <= 1.0:
        raise PeftError(f"{NAME}: idle must be in [0, 1], got {idle}")

    def init(key: Array, params: Params) -> tuple[Frozen, Trainable]:
        require_one_stack(NAME, params, _WHY)
        (stack,) = stacks_of(NAME, params)
        layer = _plain(params)
        features = layer["up"]["kernel"].shape[-1]
        places = jnp.arange(features) >= active_features(features, idle)
        whole = jnp.broadcast_to(places, (stack.num_layers, features))
        return Frozen(params, {_STATE: {"idle": whole}}), {}

    def apply(frozen: Frozen, trainable: Trainable, *, key: Array | None = None) -> Params:
        blocks = frozen.params["blocks"]
        layer = {**blocks["feed_forward"], **frozen.state[_STATE]}
        return {**frozen.params, "blocks": {**blocks, "feed_forward": layer}}

    def model(forward: Forward) -> Forward:
        def rewrite(backbone: Backbone) -> Backbone:
            require_one_stack(NAME, backbone, _WHY)
            return _with_config(backbone, idle=True)

        return rewrite_stacks(NAME, forward, rewrite)

    return Transform(NAME, {}, init, apply, model)


def repavit_merged(model: Forward, params: Params, *, idle: float = 0.75) -> tuple[Backbone, Params]:
    """The smaller backbone, and its parameters, that gives what one trained with `repavit` gives.

    Args:
        model: the backbone as it was loaded.
        params: its plain trained parameters, such as `merge` of the method beside it gives.
        idle: of the `repavit` that it was trained with.

    Raises:
        PeftError: it is no backbone of one stack, or has experts or a weight that is not a plain array.
    """
    backbone = require_backbone(NAME, model)
    require_one_stack(NAME, backbone, _WHY)
    layer = _plain(params)
    count = active_features(layer["up"]["kernel"].shape[-1], idle)

    wide = {
        name: {leaf: jnp.asarray(own, jnp.float32) for leaf, own in layer[name].items()} for name in layer
    }
    up, down, high = wide["up"], wide["down"]["kernel"], lax.Precision.HIGHEST
    direct = {"kernel": jnp.matmul(up["kernel"][..., count:], down[:, count:], precision=high)}
    if "bias" in up:
        direct["bias"] = jnp.einsum("lf,lfd->ld", up["bias"][..., count:], down[:, count:], precision=high)

    def cut(w: Array, axis: int) -> Array:
        """Of the activated features; of none, one that is zero, since no layer is of size 0."""
        return (
            lax.slice_in_dim(w, 0, count, axis=axis) if count else 0.0 * lax.slice_in_dim(w, 0, 1, axis=axis)
        )

    made: dict[str, Any] = {"direct": direct, "down": {**wide["down"], "kernel": cut(down, 1)}}
    for name in wide.keys() & {"up", "gate"}:
        made[name] = {leaf: cut(own, own.ndim - 1) for leaf, own in wide[name].items()}
    dtype = layer["up"]["kernel"].dtype
    made = {name: {leaf: own.astype(dtype) for leaf, own in parts.items()} for name, parts in made.items()}
    merged = {**params, "blocks": {**params["blocks"], "feed_forward": made}}
    return _with_config(backbone, direct=True, inner_size=max(1, count)), merged


def active_features(features: int, idle: float) -> int:
    """K: how many of the inner features are activated."""
    return math.ceil(features * (1.0 - idle))


def _with_config(backbone: Backbone, **changes: Any) -> Backbone:
    block = backbone.block
    return dataclasses.replace(
        backbone, block=block.clone(config=dataclasses.replace(block.config, **changes))
    )


def _plain(params: Params) -> Mapping[str, Any]:
    """The stacked parameters of the feed-forwards.

    Raises:
        PeftError: they are not plain arrays of one feed-forward a block.
    """
    layer = params["blocks"]["feed_forward"]
    if "up" not in layer or getattr(layer["up"].get("kernel"), "ndim", 0) != 3:
        raise PeftError(f"{NAME}: blocks with experts have no idle features; leave it out")
    return layer
