"""Visual query tuning: queries that read the tokens of every frozen layer, and a linear head over them.

Tu, Mai and Chao 2023, arXiv 2212.03220. For layer l of L, with its frozen tokens Z_{l-1} [B, S, D] and T
queries P_l [T, D] of its own:

    F_l = Block_l(P_l; keys and values of Z_{l-1})   [B, T, D]    the same weights, norms and residuals
    Z_l = Block_l(Z_{l-1})                                        as without queries
    f   = [ |c| ; |F_1| ; ... ; |F_L| ],   logits = f W + b       W [E + L T D, C]

|x| is x over its norm; c [B, E] is what the model's own classifier reads, which the new head replaces.
Trained: P, W and b. Backward never crosses a layer: it keeps, for each layer, keys and values of its tokens
and the query path of T tokens, under a `remat` policy that saves nothing Z_{l-1} instead, and with two
passes Z_0 alone for all layers. Nothing else in the blocks or below can be trained beside it.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from peftjax.backbone.backbone import Backbone, Layer
from peftjax.backbone.context import Context
from peftjax.backbone.layers import dropout
from peftjax.backbone.protocols import DropoutKey
from peftjax.backbone.rewriting import (
    add_to_blocks,
    require_backbone,
    require_one_stack,
    require_scan,
    stacks_of,
)
from peftjax.core import tree
from peftjax.core.checks import fraction, one_of, positive
from peftjax.core.errors import PeftError
from peftjax.methods.side._layer_states import detached
from peftjax.methods.side._vqt_head import Features, QueryHead
from peftjax.transform.frozen import Frozen, Params, Trainable
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Forward, GradientCut, Transform

NAME = "vqt"
NEEDS_A_CLASSIFIER = (
    "vqt puts a linear classifier over all layers instead of the model's, and this model has none; "
    "load it with head='classifier'"
)


@register(
    kind="adapter",
    paper="visual query tuning, Tu et al. 2023, arXiv 2212.03220",
    trains="T D a layer, and (E + L T D + 1) C for the head",
    backward_keeps="keys and values of the tokens; nothing with passes=2",
    mergeable=False,
    of_blocks=True,
    conformance=Conformance(example={"num_queries": 2}, starts_as_base=False, reads_classifier=True),
)
def vqt(*, num_queries: int = 1, passes: int = 1, dropout: float = 0.1) -> Transform:
    """Queries that read every frozen layer, and a linear head over all (arXiv 2212.03220).

    `logits = [|c|; |F_1|; ...; |F_L|] W + b` with `F_l = Block_l(P_l; Z_{l-1})`.

    Args:
        num_queries: T, for each layer.
        passes: 1 keeps for backward what the query path of every layer reads; 2 runs the layers again, with
            the same gradients, and keeps nothing that grows with their number.
        dropout: rate on P.

    Raises:
        PeftError: for a setting out of range; in `init` and `model`, for what is not a backbone with a
            classifier and one stack of blocks.
    """
    positive(NAME, "num_queries", num_queries)
    one_of(NAME, "passes", passes, (1, 2))
    fraction(NAME, "dropout", dropout)

    def init(key: Array, params: Params) -> tuple[Frozen, Trainable]:
        layers, width, read, classes = _sizes(params)
        query_key, head_key = jax.random.split(key)
        bound = math.sqrt(6.0 / (_patch_inputs(params, width) + width))
        shape = (layers, num_queries, width)
        inputs = read + layers * num_queries * width
        kernel = math.sqrt(2.0 / classes) * jax.random.normal(head_key, (inputs, classes))
        queries = jax.random.uniform(query_key, shape, minval=-bound, maxval=bound)
        return Frozen(params), {"queries": queries, "head": {"kernel": kernel, "bias": jnp.zeros(classes)}}

    def apply(frozen: Frozen, trainable: Trainable, *, key: Array | None = None) -> Params:
        added = {"queries": trainable["queries"]}
        if key is not None:
            added["key"] = jax.random.split(key, len(trainable["queries"]))
        params = add_to_blocks(NAME, frozen.params, {"blocks": added})
        return {**params, "head": {**params["head"], NAME: trainable["head"]}}

    def model(forward: Forward) -> Forward:
        backbone = require_backbone(NAME, forward)
        require_scan(NAME, backbone)
        _require_one_stack(backbone)
        if "classifier" not in backbone.head_name:
            raise PeftError(NEEDS_A_CLASSIFIER)
        stack = QueryStack(passes, dropout)
        return dataclasses.replace(backbone, stack=stack, head=QueryHead(backbone.head, NAME))

    cut = GradientCut("use pj.sherl, which trains the last layer too")
    return Transform(NAME, {}, init, apply, model, cut=cut)


@dataclasses.dataclass(frozen=True)
class QueryStack:
    """The blocks with queries beside their tokens; gives H_L and F to the `QueryHead`.

    Attributes:
        passes: 1 or 2.
        dropout: rate on the queries, where they come with a key.
    """

    name: ClassVar[str] = NAME
    passes: int
    dropout: float

    def run(
        self,
        model: Backbone,
        params: Params,
        hidden: Float[Array, "B S D"],
        context: Context,
        key: DropoutKey,
    ) -> tuple[Float[Array, "B S D"], Features]:
        """Without dropout in the blocks, whatever the key."""
        layers = model.layers(params)
        weights = dict(layers.weights)
        own = weights.pop(NAME)
        run = self._two_passes(model) if self.passes == 2 else self._one_pass(model)
        frozen = detached((layers._replace(weights=weights), hidden, context))
        hidden, features = run(own["queries"], own.get("key"), *frozen)
        # Of two passes, H_L would look as if it depended on the queries.
        return detached(hidden), features

    def _one_pass(self, model: Backbone) -> Callable[..., tuple[Array, Features]]:
        def run(
            queries: Array, keys: Array | None, layers: Layer, hidden: Array, context: Context
        ) -> tuple[Array, Features]:
            def body(hidden: Array, xs: Any) -> tuple[Array, Array]:
                *own, layer = xs
                after = detached(model.run_layer(layer, hidden, context))
                return after, self._read(model, *own, layer, hidden, context)

            length = model.num_layers
            xs = (queries, keys, layers)
            return jax.lax.scan(model.checkpointed(body), hidden, xs, length=length, unroll=model.unroll)

        return run

    def _two_passes(self, model: Backbone) -> Callable[..., tuple[Array, Features]]:
        one_pass = self._one_pass(model)
        run = jax.custom_vjp(one_pass)

        def forward(*inputs: Any) -> tuple[Any, Any]:
            return one_pass(*inputs), inputs

        def backward(inputs: Any, cotangents: tuple[Array, Features]) -> tuple[Any, ...]:
            queries, keys, layers, hidden, context = inputs

            def body(hidden: Array, xs: Any) -> tuple[Array, Array]:
                queries, key, layer, cotangent = xs
                _, pull = jax.vjp(lambda q: self._read(model, q, key, layer, hidden, context), queries)
                return model.run_layer(layer, hidden, context), pull(cotangent)[0]

            xs, length = (queries, keys, layers, cotangents[1]), model.num_layers
            return jax.lax.scan(body, hidden, xs, length=length, unroll=model.unroll)[1], *[None] * 4

        run.defvjp(forward, backward)
        return run

    def _read(
        self,
        model: Backbone,
        queries: Float[Array, "T D"],
        key: Key[Array, ""] | None,
        layer: Layer,
        hidden: Float[Array, "B S D"],
        context: Context,
    ) -> Float[Array, "B T D"]:
        """F of one layer, whose tokens are `hidden`."""
        rows = jnp.broadcast_to(queries.astype(hidden.dtype), (len(hidden), *queries.shape))
        return model.run_layer(
            layer, dropout(rows, self.dropout, key), dataclasses.replace(context, attended=hidden)
        )

    def empty_cache(self, *_: Any) -> Any:
        """Raise a PeftError: a classifier does not generate."""
        raise PeftError("vqt classifies and has no next tokens; use another method to generate")

    run_cached = empty_cache


def _sizes(params: Params) -> tuple[int, int, int, int]:
    """L, D, E and C."""
    stack = stacks_of(NAME, params)[0]
    _require_one_stack(params)
    kernel = tree.named_leaves(params["head"]).get("classifier/kernel")
    if kernel is None:
        raise PeftError(NEEDS_A_CLASSIFIER)
    return stack.num_layers, stack.width, *kernel.shape


def _patch_inputs(params: Params, width: int) -> int:
    """Numbers in a patch of the image; D for text, which has no patches."""
    kernel = tree.named_leaves(params["embed"]).get("patch_conv/kernel")
    return width if kernel is None else math.prod(kernel.shape[:-1])


def _require_one_stack(owner: Backbone | Params) -> None:
    require_one_stack(NAME, owner, "it says nothing of queries in two stacks")
