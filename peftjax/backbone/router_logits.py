"""What the routers of a model's experts say, beside its outputs: for a loss that balances them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float

from peftjax.backbone.backbone import Backbone, Layer, Scan
from peftjax.backbone.protocols import Batch, DropoutKey, Params
from peftjax.core.errors import PeftError


def with_router_logits(model: Backbone) -> Callable[..., tuple[Any, Float[Array, "L B S E"]]]:
    """`(params, batch, *, key=None) -> (outputs, router logits)`, the outputs being the model's.

    Raises:
        PeftError: the blocks have no experts, or a method changes them or how they are run.

    Examples:
        >>> from peftjax.models.mixtral import MIXTRAL
        >>> sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2}
        >>> heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4}
        >>> model = MIXTRAL.build(MIXTRAL.read_config({"model_type": "mixtral", **sizes, **heads}))
        >>> batch = {"input_ids": jnp.ones((1, 5), jnp.int32)}
        >>> with_router_logits(model)(model.init(jax.random.key(0)), batch)[1].shape
        (2, 1, 5, 4)
    """
    if getattr(model.block, "config", None) is None or model.block.config.experts is None:
        raise PeftError("the blocks of this model have no experts, and so no router")
    if not hasattr(model.block, "router_logits") or not isinstance(model.stack, Scan):
        raise PeftError("router logits are those of a model whose blocks no method changes; leave it out")

    def forward(params: Params, batch: Batch, *, key: DropoutKey = None) -> tuple[Any, Array]:
        keys = (None, None, None) if key is None else tuple(jax.random.split(key, 3))
        hidden, context = model.run_embed(params, batch, key=keys[0])

        def body(hidden: Array, layer: Layer) -> tuple[Array, Array]:
            hidden = model.run_layer(layer, hidden, context, part="attention")
            logits = model.block.apply({"params": layer.weights}, hidden, method="router_logits")
            return model.run_layer(layer, hidden, context, part="feed_forward"), logits

        layers, length = model.layers(params, keys[1]), model.num_layers
        hidden, logits = jax.lax.scan(
            model.checkpointed(body), hidden, layers, length=length, unroll=model.unroll
        )
        return model.run_head(params, hidden, context, key=keys[2]), logits

    return forward
