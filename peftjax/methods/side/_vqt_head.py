"""The head of `vqt`: a linear classifier over what the model's own classifier reads and what queries gave."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from peftjax.backbone.context import Context
from peftjax.backbone.functional import linear
from peftjax.backbone.protocols import Params
from peftjax.backbone.rewritten import RewrittenModule
from peftjax.methods.side._layer_states import unit

Features = Float[Array, "L B T D"]
EPSILON = 1e-12


@dataclasses.dataclass(frozen=True)
class QueryHead(RewrittenModule):
    """The linear classifier over the features of all layers, beside a head whose classifier it replaces.

    Attributes:
        inner: the model's own head, which gives c.
        added_as: the name of the new classifier's parameters beside the head's.
    """

    added_as: str

    def apply(
        self, variables: Any, read: tuple[Array, Features], context: Context, embed: Params, **options: Any
    ) -> Float[Array, "B C"]:
        """The logits from H_L [B, S, D] and F [L, B, T, D]."""
        hidden, features = read
        weights = dict(variables["params"])
        own = weights.pop(self.added_as)
        with nn.intercept_methods(_stop_before_the_classifier):
            first = self.inner.apply({"params": weights}, hidden, context, embed, **options)
        # [B, L, T D]: the norm is that of a layer, over its queries together.
        layers = features.transpose(1, 0, 2, 3).reshape(features.shape[1], len(features), -1)
        rows = [unit(first, EPSILON), unit(layers, EPSILON).reshape(len(first), -1)]
        return linear(own, jnp.concatenate(rows, axis=-1).astype(first.dtype))


def _stop_before_the_classifier(
    run: Callable[..., Any], inputs: tuple[Any, ...], options: Mapping[str, Any], called: Any
) -> Any:
    """The last layer of every classifier's head is called so, and gives back what it reads."""
    if called.module.name == "classifier" and called.method_name == "__call__":
        return inputs[0]
    return run(*inputs, **options)
