"""PockEngine's cut: the backward pass ends at the first of the last layers, and keeps nothing of those below.

Paper: Zhu et al., "PockEngine: Sparse and Efficient Fine-tuning in a Pocket", MICRO 2023, arXiv 2310.17752.

    layers 1 ... L - k    a scan of their own, whose result gets no gradient: no residual, no product backward
    the last k            as they are

It trains nothing and goes beside a method of the last k layers: `pj.chain(pj.pockengine(layers=4),
pj.lora(layers=range(28, 32)))`. What is trained below gets a gradient of zero. A scan over all layers has the
backward pass of all, whichever are trained. How many layers a budget of bytes allows:
`peftjax.planner.search.largest` over the plan of each number.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from peftjax.backbone.backbone import Backbone, Layer, Scan
from peftjax.backbone.context import Context
from peftjax.backbone.protocols import Cache, DropoutKey, Params
from peftjax.backbone.rewriting import require_scan, rewrite_stacks, stacks_of
from peftjax.core.checks import positive
from peftjax.transform.frozen import Frozen, Trainable
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Forward, Transform


@dataclasses.dataclass(frozen=True)
class EndedScan:
    """Two scans, the first without a backward pass.

    Attributes:
        layers: how many the second one has.
        name: of the method.
    """

    layers: int
    name: str = "pockengine"

    def run(
        self,
        model: Backbone,
        params: Params,
        hidden: Float[Array, "B S D"],
        context: Context,
        key: DropoutKey,
    ) -> Float[Array, "B S D"]:
        """The hidden states after the last block."""

        def body(hidden: Array, layer: Layer, context: Context = context) -> tuple[Array, None]:
            return model.run_layer(layer, hidden, context), None

        layers, first = model.layers(params, key), model.num_layers - self.layers
        still, shared = jax.lax.stop_gradient((layers, context))
        taken = partial(jax.lax.dynamic_index_in_dim, keepdims=False)

        def below(hidden: Array, number: Array) -> tuple[Array, None]:
            # Taken one by one: a part of a stack that a scan is given would be copied.
            return body(hidden, jax.tree.map(lambda leaf: taken(leaf, number), still), shared)

        numbers, unroll = jnp.arange(first), min(model.unroll, first)
        hidden = jax.lax.scan(below, jax.lax.stop_gradient(hidden), numbers, unroll=unroll)[0]
        above, unroll = jax.tree.map(lambda leaf: leaf[first:], layers), min(model.unroll, self.layers)
        return jax.lax.scan(model.checkpointed(body), hidden, above, length=self.layers, unroll=unroll)[0]

    def empty_cache(
        self, model: Backbone, params: Params, hidden: Float[Array, "B S D"], context: Context
    ) -> Cache:
        """As of one scan."""
        return Scan().empty_cache(model, params, hidden, context)

    def run_cached(
        self,
        model: Backbone,
        params: Params,
        hidden: Float[Array, "B S D"],
        context: Context,
        cache: Cache,
    ) -> tuple[Float[Array, "B S D"], Cache]:
        """As of one scan."""
        return Scan().run_cached(model, params, hidden, context, cache)


@register(
    kind="companion",
    paper="PockEngine, Zhu et al. 2023, arXiv 2310.17752",
    trains="nothing",
    backward_keeps="nothing of the layers below the last k",
    of_blocks=True,
    conformance=Conformance(example={"layers": 6}),
)
def pockengine(*, layers: int) -> Transform:
    """End the backward pass at the first of the last layers (arXiv 2310.17752).

    Args:
        layers: k, how many of the last layers of each stack have a backward pass; a stack that has no more is
            left as it is.

    Raises:
        PeftError: here for a number out of range; in `init` and `model`, when it is not a backbone of
            peftjax; in `model` beside a method that runs the blocks another way.
    """
    positive("pockengine", "layers", layers)

    def init(key: Array, params: Params) -> tuple[Frozen, Trainable]:
        stacks_of("pockengine", params)
        return Frozen(params), {}

    def apply(frozen: Frozen, trainable: Trainable, *, key: Array | None = None) -> Any:
        return frozen.params

    def model(forward: Forward) -> Backbone:
        return rewrite_stacks("pockengine", forward, ended)

    def ended(backbone: Backbone) -> Backbone:
        require_scan("pockengine", backbone)
        whole = layers >= backbone.num_layers
        return backbone if whole else dataclasses.replace(backbone, stack=EndedScan(layers))

    return Transform("pockengine", {}, init, apply, model)
