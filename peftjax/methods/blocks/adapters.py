"""Bottleneck adapters: small trained layers inside the frozen blocks.

Houlsby et al. 2019, arXiv 1902.00751; Pfeiffer et al. 2021, arXiv 2005.00247.

    houlsby:   after attention and after the feed-forward, both before the residual sum
    pfeiffer:  after the feed-forward only

Trained: 2 D r + D + r numbers an adapter (see `bottleneck`). W_up starts at zero, so a fresh adapter changes
nothing. It does not merge: the activation lies between its two matrices.
"""

import dataclasses
from typing import Any

import jax
from jax import Array

from peftjax.methods.blocks.bottleneck import AdapterBlock, Bottleneck
from peftjax.methods.blocks.stacks import add_to_blocks, rewrite_stacks, stacks_of
from peftjax.methods.targets import key_for
from peftjax.transform import Forward, Frozen, MethodInfo, Params, Trainable, Transform


def pfeiffer(
    *, size: int = 48, activation: str = "relu", scale: float = 1.0, dropout: float = 0.0
) -> Transform:
    """An adapter after each feed-forward (arXiv 2005.00247).

    Args:
        size: r, the width of the bottleneck.
        activation: "relu", "gelu", "gelu_new", "silu" or "tanh".
        scale: s.
        dropout: rate after the activation.

    Raises:
        PeftError: for a setting out of range; in `init` and `model`, when it is not a backbone's.
    """
    config = {"size": size, "activation": activation, "scale": scale, "dropout": dropout}
    bottleneck = Bottleneck(size, "sequential", scale, activation, dropout)
    return with_adapters("pfeiffer", config, {"feed_forward": bottleneck})


def with_adapters(name: str, config: dict[str, Any], bottlenecks: dict[str, Bottleneck]) -> Transform:
    """The method that puts a bottleneck in each of the branches named."""
    for bottleneck in bottlenecks.values():
        bottleneck.require_valid(name)

    def init(key: Array, params: Params) -> tuple[Frozen, Trainable]:
        trainable = {}
        for stack in stacks_of(name, params):
            for branch, bottleneck in bottlenecks.items():
                own_key = key_for(key, f"{stack.name}/{branch}")
                values = bottleneck.init(own_key, (stack.num_layers,), stack.width)
                trainable.setdefault(stack.name, {})[branch] = values
        return Frozen(params), trainable

    def apply(frozen: Frozen, trainable: Trainable, *, key: Array | None = None) -> Params:
        added = {}
        for number, stack in enumerate(stacks_of(name, frozen.params)):
            added[stack.name] = dict(trainable[stack.name])
            if key is not None:
                keys = jax.random.split(jax.random.fold_in(key, number), stack.num_layers)
                added[stack.name]["key"] = keys
        return add_to_blocks(name, frozen.params, added)

    def model(forward: Forward) -> Forward:
        def rewrite(backbone: Any) -> Any:
            return dataclasses.replace(backbone, block=AdapterBlock(backbone.block, name, **bottlenecks))

        return rewrite_stacks(name, forward, rewrite)

    return Transform(name, config, init, apply, model)


PFEIFFER = MethodInfo(
    name="pfeiffer",
    factory=pfeiffer,
    paper="adapters after the feed-forward, Pfeiffer et al. 2021, arXiv 2005.00247",
    trains="2 D r + D + r a layer",
    keeps="what the branch gives and r values a token",
    mergeable=False,
    example={"size": 2},
    of_blocks=True,
)
