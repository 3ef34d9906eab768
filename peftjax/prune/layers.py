"""Layers that are skipped, by a mask that is a parameter: one program for every choice of layers."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from peftjax.backbone.backbone import Backbone
from peftjax.backbone.context import Context
from peftjax.backbone.protocols import Params
from peftjax.backbone.rewriting import add_to_blocks, rewrite_stacks
from peftjax.backbone.rewritten import RewrittenBlock
from peftjax.core import tree
from peftjax.core.errors import PeftError

NAME = "kept"


@dataclass(frozen=True)
class SkippableBlock(RewrittenBlock):
    """A block that leaves the stream as it is where its parameter `kept` is False."""

    def __call__(self, hidden: Float[Array, "B S D"], context: Context) -> Float[Array, "B S D"]:
        """The stream after the block, or as it was."""
        return jnp.where(self.added, self.inner(hidden, context), hidden)

    def attention_sublayer(self, hidden: Float[Array, "B S D"], context: Context) -> Float[Array, "B S D"]:
        """The stream after attention, or as it was."""
        return jnp.where(self.added, self.inner.attention_sublayer(hidden, context), hidden)

    def feed_forward_sublayer(self, hidden: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """The stream after the feed-forward, or as it was."""
        return jnp.where(self.added, self.inner.feed_forward_sublayer(hidden), hidden)


def skippable(model: Backbone) -> Backbone:
    """The backbone whose layers, those of an encoder too, are skipped where `with_layers` says.

    A skipped layer is computed all the same: what it saves comes with `sliced`.

    Raises:
        PeftError: the model is no backbone.
    """

    def rewrite(backbone: Backbone) -> Backbone:
        return replace(backbone, block=SkippableBlock(backbone.block, NAME))

    return rewrite_stacks("prune", model, rewrite)


def with_layers(params: Params, kept: Mapping[str, Array] | Array) -> Params:
    """The parameters of a `skippable` model in which these layers run.

    Args:
        params: those of the model as it was, or of the skippable one.
        kept: boolean [L], which may be traced; of an encoder-decoder by stack, "layers" and "encoder/layers".
            A stack that is not named runs whole.

    Raises:
        PeftError: the parameters are not of a backbone.
    """
    given = kept if isinstance(kept, Mapping) else {"layers": kept}
    stacks = {"blocks": "layers"}
    if params.get("encoder") is not None:
        stacks["encoder"] = "encoder/layers"
    added = {}
    for stack, name in stacks.items():
        blocks = params["blocks"] if stack == "blocks" else params["encoder"]["blocks"]
        depth = next(iter(tree.named_leaves(blocks).values())).shape[0]
        added[stack] = jnp.asarray(given.get(name, jnp.ones(depth, bool)), bool)
    return add_to_blocks(NAME, _without(params), added)


def _without(params: Params) -> Params:
    blocks = {name: own for name, own in params["blocks"].items() if name != NAME}
    if params.get("encoder") is not None:
        params = {**params, "encoder": _without(params["encoder"])}
    return {**params, "blocks": blocks}


def layer_scores(
    loss: Callable[[Array, Any], Array], num_layers: int, batches: Iterable[Any]
) -> Float[Array, " L"]:
    """What the loss rises by without each layer: `mean over batches of loss(all but l) - loss(all)`.

    One program serves all layers. What "without" means is the loss's: `with_layers` skips whole layers (as
    FuseGPT, arXiv 2411.14507, ranks them), `reset_layers` what a method has trained in them (layer relevance,
    RelaCtrl, arXiv 2502.14377).

    Args:
        loss: `(kept, batch) -> scalar`, kept being boolean [L].
        num_layers: L.
        batches: a calibration set, each seen L + 1 times.

    Raises:
        PeftError: there is no batch.

    Examples:
        >>> weights = jnp.array([3.0, 0.0, 1.0])
        >>> pj.prune.layer_scores(lambda kept, x: -(kept * weights).sum() * x, 3, [1.0, 1.0]).tolist()
        [3.0, 0.0, 1.0]
    """
    masks = jnp.concatenate([jnp.ones((1, num_layers), bool), ~jnp.eye(num_layers, dtype=bool)])

    @jax.jit
    def losses(batch: Any) -> Array:
        return jax.lax.map(lambda kept: loss(kept, batch).astype(jnp.float32), masks)

    total, count = jnp.zeros(num_layers + 1), 0
    for batch in batches:
        total, count = total + losses(batch), count + 1
    if count == 0:
        raise PeftError("layer_scores: there is no batch; give at least one")
    return (total[1:] - total[0]) / count


def reset_layers(trainable: Any, start: Any, kept: Array, *, stack: str = "blocks") -> Any:
    """The trainable in which layers that are not kept are as a method started them.

    Args:
        trainable: what has been trained.
        start: of the method's `init`, with which the model is the base.
        kept: boolean [L], which may be traced.
        stack: the path below which a leaf's first axis is that of the layers.

    Raises:
        PeftError: no leaf lies there with L layers.
    """
    found = []

    def chosen(path: str, own: Array, first: Array) -> Array:
        if not path.startswith(f"{stack}/") or jnp.shape(own)[:1] != kept.shape:
            return own
        found.append(path)
        return jnp.where(kept.reshape(-1, *(1,) * (own.ndim - 1)), own, first)

    starts = tree.named_leaves(start)
    result = tree.map_named(lambda path, own: chosen(path, own, starts[path]), trainable)
    if not found:
        raise PeftError(
            f"reset_layers: nothing trained below {stack!r} has {kept.size} layers; name its stack"
        )
    return result
