"""Layer replication: a deeper model of the layers of a smaller one, whose weights are held once.

    layers 0..4, ranges (0, 4), (2, 5)      ->      0 1 2 3 2 3 4

It trains nothing and goes before a method: `pj.chain(pj.layer_replication(ranges=...), pj.lora())` gives each
of the new layers factors of its own. A layer reads its weights where they are; those in front of no product,
such as norms and biases, are copied. Merged, each layer has its own weights. The ranges are those of
pass-through merges, which Hugging Face's PEFT calls `layer_replication`.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from peftjax.backbone.rewriting import NOT_A_BACKBONE, require_backbone, require_one_stack, require_scan
from peftjax.core import naming, tree
from peftjax.core.errors import PeftError
from peftjax.transform.frozen import Frozen, Params, Trainable
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Forward, Transform
from peftjax.weights.base import Weight
from peftjax.weights.canonical import to_canonical
from peftjax.weights.layout import layout_of
from peftjax.weights.repeated import Repeated, numbers_of_layers

NAME = "layer_replication"
ONE_STACK = "its ranges name the layers of one stack"


@dataclass(frozen=True, kw_only=True)
class ReplicationOptions:
    """Those of `layer_replication`.

    Attributes:
        ranges: `(first, end)` of the layers of each part of the new stack, `end` not among them.
    """

    ranges: Sequence[Sequence[int]]

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for an option out of range."""
        pairs = bool(self.ranges) and all(len(pair) == 2 for pair in self.ranges)
        if not pairs or any(not 0 <= first < end for first, end in self.ranges):
            raise PeftError(
                f"{caller}: ranges must be pairs (first, end) with 0 <= first < end, got {list(self.ranges)}"
            )

    @property
    def layers(self) -> list[int]:
        """The old number of each new layer."""
        return [layer for first, end in self.ranges for layer in range(first, end)]


@register(
    kind="rewrite",
    paper="pass-through layer replication, as Hugging Face's PEFT has it",
    trains="nothing",
    backward_keeps="nothing of its own",
    quantized_base=False,
    of_blocks=True,
    replaces_base=True,
    conformance=Conformance(example={"ranges": [(0, 4), (2, 4)]}, starts_as_base=False),
)
@takes(ReplicationOptions)
def layer_replication(options: ReplicationOptions) -> Transform:
    """Stack ranges of a model's layers, each layer's weights held once.

    Raises:
        PeftError: here for an option out of range; in `init` and `model` for a model that is no decoder or
            encoder of peftjax, or has fewer layers.
    """
    layers = options.layers

    def init(key: Array, params: Params) -> tuple[Frozen, Trainable]:
        if not isinstance(params, dict) or "blocks" not in params:
            raise PeftError(f"{NAME} {NOT_A_BACKBONE}")
        require_one_stack(NAME, params, ONE_STACK)
        leaves = tree.named_leaves(params)
        new = {path: _repeated(path, leaves, layers) for path in leaves if path.startswith("blocks/")}
        return Frozen(tree.replace(params, new)), {}

    def apply(frozen: Frozen, trainable: Trainable, *, key: Array | None = None) -> Params:
        return frozen.params

    def model(forward: Forward) -> Forward:
        backbone = require_backbone(NAME, forward)
        require_one_stack(NAME, backbone, ONE_STACK)
        require_scan(NAME, backbone)
        own = {name: np.asarray(values)[layers] for name, values in backbone.per_layer.items()}
        return dataclasses.replace(backbone, num_layers=len(layers), per_layer=own)

    return Transform(NAME, {}, init, apply, model)


def _repeated(path: str, leaves: dict[str, Any], layers: Sequence[int]) -> Any:
    """A parameter `[L, ...]` of the blocks as one of the new layers."""
    leaf, numbers = leaves[path], jnp.asarray(layers, jnp.int32)
    if max(layers) >= leaf.shape[0]:
        raise PeftError(
            f"{NAME}: a range ends at {max(layers) + 1}, and the model has {leaf.shape[0]} layers"
        )
    if isinstance(leaf, Weight):
        raise PeftError(
            f"{NAME}: {path!r} is a {type(leaf).__name__}, which has no plain layers to repeat; put it first"
        )
    if not naming.is_weight(path, leaf):
        return jnp.take(leaf, numbers, axis=0)
    held = layout_of(path, leaves, None)
    layout = held.resized((len(layers), *held.shape[1:]))
    distinct = to_canonical(leaf, held).reshape(-1, *held.matrix)
    return Repeated(numbers_of_layers(layers, held.stack[1:]), distinct, layout, leaf.dtype)
