"""What block methods share: finding the stacks of a backbone, adding parameters to them, rewriting them.

The parameters a method adds to every block lie beside the block's own, `blocks/<method>/...`, each leaf
stacked [num_layers, ...], so that the scan over the layers slices them with the rest.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peftjax.backbone.backbone import Backbone, Scan
from peftjax.backbone.protocols import Params
from peftjax.core.errors import PeftError

NOT_A_BACKBONE = (
    "rewrites the blocks of a backbone of peftjax, such as pj.load gives; "
    "use a method of weights (pj.lora, ...) on other models"
)


@dataclass(frozen=True)
class BlockStack:
    """The blocks of one stack: those of the model, or of its encoder.

    Attributes:
        name: "blocks", or "encoder" of those of the encoder.
        num_layers: L.
        width: D of the residual stream.
        key_width: K H of the keys and of the values of its attentions.
        attentions: its branches with keys and values, "attention" and perhaps "cross_attention".
        layers: the numbers of the layers that a method takes.
    """

    name: str
    num_layers: int
    width: int
    key_width: int
    attentions: tuple[str, ...]
    layers: tuple[int, ...]


def stacks_of(
    method: str, params: Params, layers: int | Sequence[int] | None = None
) -> tuple[BlockStack, ...]:
    """The stacks of the parameters of a backbone that have any of the layers: that of an encoder comes last.

    Raises:
        PeftError: they are not of a backbone; a layer is in no stack, or none is named.
    """
    if not isinstance(params, Mapping) or not isinstance(params.get("blocks"), Mapping):
        raise PeftError(f"{method} {NOT_A_BACKBONE}")
    blocks = {"blocks": params["blocks"]}
    if params.get("encoder") is not None:
        blocks["encoder"] = params["encoder"]["blocks"]
    stacks = [_stack(name, own, layers) for name, own in blocks.items()]
    if layers is not None:
        wanted = _as_set(layers)
        missing = wanted - {layer for stack in stacks for layer in stack.layers}
        if missing or not wanted:
            named = f"layer {min(missing)}" if missing else "no layer"
            longest = max(stack.num_layers for stack in stacks)
            raise PeftError(f"{method}: layers names {named}; give numbers from 0 to {longest - 1}, or None")
    return tuple(stack for stack in stacks if stack.layers)


def _stack(name: str, blocks: Params, layers: int | Sequence[int] | None) -> BlockStack:
    num_layers, width = blocks["attention_norm"]["scale"].shape
    attentions = tuple(branch for branch in ("attention", "cross_attention") if branch in blocks)
    chosen = chosen_layers(layers, num_layers)
    return BlockStack(name, num_layers, width, _key_width(blocks["attention"]), attentions, chosen)


def chosen_layers(layers: int | Sequence[int] | None, num_layers: int) -> tuple[int, ...]:
    """Those of the layers that a stack of that many has; None is all."""
    wanted = range(num_layers) if layers is None else _as_set(layers)
    return tuple(layer for layer in range(num_layers) if layer in wanted)


def _as_set(layers: int | Sequence[int]) -> set[int]:
    return {layers} if isinstance(layers, int) else set(layers)


def _key_width(attention: Params) -> int:
    """K H, from the key's kernel [L, D, K H] or from qkv [L, D, (N + 2 K) H] and output [L, N H, D]."""
    if "qkv" in attention:
        return (attention["qkv"]["kernel"].shape[-1] - attention["output"]["kernel"].shape[-2]) // 2
    return attention["key"]["kernel"].shape[-1]


def add_to_blocks(method: str, params: Params, added: Mapping[str, Any]) -> Params:
    """The parameters with `added[name of a stack]`, where given, as the parameters `method` of its blocks.

    Raises:
        PeftError: the blocks have such parameters already.
    """
    blocks = params["blocks"]
    if method in blocks:
        raise PeftError(f"chain: {method!r} rewrites the blocks twice; leave one of the two out")
    if "blocks" in added:
        params = {**params, "blocks": {**blocks, method: added["blocks"]}}
    if "encoder" in added:
        encoder = add_to_blocks(method, params["encoder"], {"blocks": added["encoder"]})
        params = {**params, "encoder": encoder}
    return params


def rewrite_stacks(
    method: str, model: Callable[..., Any], rewrite: Callable[[Backbone], Backbone]
) -> Backbone:
    """The backbone with `rewrite(backbone of one stack)` on it and on its encoder.

    Raises:
        PeftError: the model is not a backbone.
    """
    backbone = require_backbone(method, model)
    encoder = None if backbone.encoder is None else rewrite_stacks(method, backbone.encoder, rewrite)
    return rewrite(dataclasses.replace(backbone, encoder=encoder))


def require_backbone(method: str, model: Callable[..., Any]) -> Backbone:
    """The model, which is a backbone, or a PeftError."""
    if not isinstance(model, Backbone):
        raise PeftError(f"{method} {NOT_A_BACKBONE}")
    return model


def require_scan(method: str, backbone: Backbone) -> None:
    """Raise a PeftError where another method has changed how the blocks are run."""
    if not isinstance(backbone.stack, Scan):
        other = getattr(backbone.stack, "name", type(backbone.stack).__name__)
        raise PeftError(f"chain: {method!r} and {other!r} both run the blocks; leave one of the two out")


def require_one_stack(method: str, owner: Backbone | Params, why: str) -> None:
    """Raise a PeftError for an encoder-decoder: a backbone, or its parameters."""
    encoder = owner.get("encoder") if isinstance(owner, Mapping) else owner.encoder
    if encoder is not None:
        raise PeftError(
            f"{method} is not for an encoder-decoder: {why}; use a method of weights (pj.lora, ...)"
        )
