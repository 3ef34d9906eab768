"""What block methods share: finding the stacks of a backbone, adding parameters to them, rewriting them.

The parameters a method adds to every block lie beside the block's own, `blocks/<method>/...`, each leaf
stacked [num_layers, ...], so that the scan over the layers slices them with the rest.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peftjax.core.errors import PeftError
from peftjax.transform.frozen import Params
from peftjax.transform.transform import Forward

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


def stacks_of(who: str, params: Params, layers: int | Sequence[int] | None = None) -> tuple[BlockStack, ...]:
    """The stacks of the parameters of a backbone that have any of the layers: that of an encoder comes last.

    Raises:
        PeftError: they are not of a backbone; a layer is in no stack, or none is named.
    """
    if not isinstance(params, Mapping) or not isinstance(params.get("blocks"), Mapping):
        raise PeftError(f"{who} {NOT_A_BACKBONE}")
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
            raise PeftError(f"{who}: layers names {named}; give numbers from 0 to {longest - 1}, or None")
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


def add_to_blocks(who: str, params: Params, added: Mapping[str, Any]) -> Params:
    """The parameters with `added[name of a stack]`, where given, as the parameters `who` of its blocks.

    Raises:
        PeftError: the blocks have such parameters already.
    """
    blocks = params["blocks"]
    if who in blocks:
        raise PeftError(f"chain: {who!r} rewrites the blocks twice; leave one of the two out")
    if "blocks" in added:
        params = {**params, "blocks": {**blocks, who: added["blocks"]}}
    if "encoder" in added:
        encoder = add_to_blocks(who, params["encoder"], {"blocks": added["encoder"]})
        params = {**params, "encoder": encoder}
    return params


def rewrite_stacks(who: str, model: Forward, rewrite: Callable[[Any], Any]) -> Any:
    """The backbone with `rewrite(backbone of one stack)` on it and on its encoder.

    Raises:
        PeftError: the model is not a backbone.
    """
    require_backbone(who, model)
    encoder = None if model.encoder is None else rewrite_stacks(who, model.encoder, rewrite)
    return rewrite(dataclasses.replace(model, encoder=encoder))


def require_backbone(who: str, model: Forward) -> None:
    """Raise a PeftError unless the model is a backbone, told by its parts."""
    if not all(hasattr(model, part) for part in ("block", "stack", "run_layer")):
        raise PeftError(f"{who} {NOT_A_BACKBONE}")


def require_scan(who: str, backbone: Any) -> None:
    """Raise a PeftError where another method has changed how the blocks are run."""
    name = type(backbone.stack).__name__
    if name != "Scan":
        other = getattr(backbone.stack, "name", name)
        raise PeftError(f"chain: {who!r} and {other!r} both run the blocks; leave one of the two out")


def require_one_stack(who: str, owner: Any, why: str) -> None:
    """Raise a PeftError for an encoder-decoder: a backbone, or its parameters."""
    encoder = owner.get("encoder") if isinstance(owner, Mapping) else owner.encoder
    if encoder is not None:
        raise PeftError(f"{who} is not for an encoder-decoder: {why}; use a method of weights (pj.lora, ...)")
