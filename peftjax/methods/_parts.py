"""A method of blocks made of parts, each with its parameters in a layer and a block that reads them."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import jax
from jax import Array

from peftjax.backbone.backbone import Backbone
from peftjax.backbone.protocols import BlockModule
from peftjax.backbone.rewriting import BlockStack, add_to_blocks, chosen_layers, rewrite_stacks, stacks_of
from peftjax.backbone.rewritten import RewrittenBlock
from peftjax.methods._targets import on_layers
from peftjax.transform.frozen import Frozen, Params, Trainable
from peftjax.transform.transform import Forward, Transform

Layers = int | Sequence[int] | None


class Part(Protocol):
    """What a method adds to the blocks of a stack.

    What it trains lies under names that no other part of the method has. Zeros instead of what it adds
    to a layer leave the layer as it was: they fill the layers that the method does not take.
    """

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for a setting out of range."""

    def init(self, key: Array, stack: BlockStack) -> dict[str, Any]:
        """What is trained, float32."""

    def added(self, trained: Any, stack: BlockStack, key: Array | None) -> dict[str, Any]:
        """What the blocks read of it, each leaf [len(stack.layers), ...]; the key drives its randomness."""

    def rewrite(self, block: BlockModule, name: str) -> RewrittenBlock:
        """The block that reads it among the parameters `name`; `key`, where there is one, for its dropout."""


def of_parts(name: str, parts: Sequence[Part], layers: Layers = None) -> Transform:
    """The method that adds the parts to the layers named, of the model and of its encoder; None is all.

    Raises:
        PeftError: for a setting out of range; in `init` and `model`, when it is not a backbone's; in
            `init`, for a layer that is in no stack.
    """
    for part in parts:
        part.require_valid(name)
    layers = layers if layers is None or isinstance(layers, int) else [int(layer) for layer in layers]

    def init(key: Array, params: Params) -> tuple[Frozen, Trainable]:
        stacks = stacks_of(name, params, layers)
        trainable = {stack.name: {} for stack in stacks}
        for stack in stacks:
            for part in parts:
                trainable[stack.name] |= part.init(key, stack)
        return Frozen(params, plan=stacks), trainable

    def apply(frozen: Frozen, trainable: Trainable, *, key: Array | None = None) -> Params:
        added = {}
        for number, stack in enumerate(frozen.plan):
            own_key = None if key is None else jax.random.fold_in(key, number)
            values = {}
            for part in parts:
                values |= part.added(trainable[stack.name], stack, own_key)
            values = jax.tree.map(lambda leaf, s=stack: on_layers(leaf, s.layers, s.num_layers), values)
            if own_key is not None:
                # With the parameters, for nothing else of `apply` reaches the blocks.
                values["key"] = jax.random.split(own_key, stack.num_layers)
            added[stack.name] = values
        return add_to_blocks(name, frozen.params, added)

    def model(forward: Forward) -> Forward:
        def rewrite(backbone: Backbone) -> Backbone:
            block = backbone.block
            if chosen_layers(layers, backbone.num_layers):
                for part in parts:
                    block = part.rewrite(block, name)
            return dataclasses.replace(backbone, block=block)

        return rewrite_stacks(name, forward, rewrite)

    return Transform(name, {}, init, apply, model)
