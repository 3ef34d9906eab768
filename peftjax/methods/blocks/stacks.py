"""What block methods share: finding the stacks of a backbone, adding parameters to them, rewriting them.

The parameters a method adds to every block lie beside the block's own, `blocks/<method>/...`, each leaf
stacked [num_layers, ...], so that the scan over the layers slices them with the rest.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from peftjax.errors import PeftError
from peftjax.transform import Forward, Params

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
    """

    name: str
    num_layers: int
    width: int


def stacks_of(who: str, params: Params) -> tuple[BlockStack, ...]:
    """The stacks of the parameters of a backbone: that of an encoder comes last.

    Raises:
        PeftError: they are not of a backbone.
    """
    if not isinstance(params, Mapping) or not isinstance(params.get("blocks"), Mapping):
        raise PeftError(f"{who} {NOT_A_BACKBONE}")
    parts = {"blocks": params, "encoder": params.get("encoder")}
    stacks = []
    for name, part in parts.items():
        if part is not None:
            num_layers, width = part["blocks"]["attention_norm"]["scale"].shape
            stacks.append(BlockStack(name, num_layers, width))
    return tuple(stacks)


def add_to_blocks(who: str, params: Params, added: Mapping[str, Any]) -> Params:
    """The parameters with `added[name of a stack]` as the parameters `who` of its blocks.

    Raises:
        PeftError: the blocks have such parameters already.
    """
    blocks = params["blocks"]
    if who in blocks:
        raise PeftError(f"chain: {who!r} rewrites the blocks twice; leave one of the two out")
    params = {**params, "blocks": {**blocks, who: added["blocks"]}}
    if "encoder" in added:
        params["encoder"] = add_to_blocks(who, params["encoder"], {"blocks": added["encoder"]})
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
