"""A model with other sizes of its blocks, and what its family's `config.json` can say of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from peftjax.backbone.backbone import Backbone
from peftjax.backbone.block_config import BlockConfig
from peftjax.models.decoder import FULL, SLIDING, DecoderConfig
from peftjax.models.t5_config import T5Config

LLAMA = {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "inner_size": "intermediate_size",
    "experts": "num_local_experts",
}
NAMES = {
    "qwen3_moe": {**LLAMA, "inner_size": "moe_intermediate_size", "experts": "num_experts"},
    "gpt2": {"num_layers": "n_layer", "inner_size": "n_inner"},
    "opt": {"num_layers": "num_hidden_layers", "inner_size": "ffn_dim"},
}
"""What the settings of decoders are called, where not as Llama's. Without `head_dim`, a head has D / N."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Those of the blocks of one stack.

    Attributes:
        layers: the numbers of the layers that are left, ascending.
        num_heads: N.
        num_kv_heads: K.
        inner_size: F, of each expert where there are some.
        experts: E, None without.
    """

    layers: tuple[int, ...]
    num_heads: int
    num_kv_heads: int
    inner_size: int
    experts: int | None


def sizes_of(model: Backbone) -> Sizes:
    """Those of a model's blocks."""
    config = model.block.config
    return Sizes(
        layers=tuple(range(model.num_layers)),
        num_heads=config.num_heads,
        num_kv_heads=config.kv_heads,
        inner_size=config.inner_size,
        experts=None if config.experts is None else config.experts.count,
    )


def resized(model: Backbone, sizes: Sizes, encoder: Sizes | None = None) -> Backbone:
    """The model with blocks of other sizes, whose heads are as wide as they were.

    Its configuration says so as far as the family's can; what it cannot say, `pj.save` refuses.

    Args:
        model: a backbone of a family of `pj.load`, or any other, of which the blocks alone change.
        sizes: of its own stack.
        encoder: of its encoder's.
    """
    config = resized_config(model, sizes, encoder)
    own = _with_block(model, sizes, _for_stack(config, sizes))
    if model.encoder is not None and encoder is not None:
        stack = _with_block(model.encoder, encoder, _for_stack(config, encoder))
        own = dataclasses.replace(own, encoder=stack)
    return dataclasses.replace(own, config=config)


def resized_config(model: Backbone, sizes: Sizes, encoder: Sizes | None) -> Any:
    """The family's configuration with what it can say of the sizes."""
    config = model.config
    if isinstance(config, T5Config):
        return _t5(model, sizes, encoder)
    if isinstance(config, DecoderConfig):
        return _decoder(config, sizes)
    named = {"num_hidden_layers": len(sizes.layers), "intermediate_size": sizes.inner_size}
    known = (
        {field.name for field in dataclasses.fields(config)} if dataclasses.is_dataclass(config) else set()
    )
    return dataclasses.replace(config, **named) if named.keys() <= known else config


def resized_block(config: BlockConfig, sizes: Sizes) -> BlockConfig:
    """The blocks' configuration with other sizes."""
    experts = config.experts
    if experts is not None and sizes.experts is not None:
        experts = dataclasses.replace(experts, count=sizes.experts)
    return dataclasses.replace(
        config,
        num_heads=sizes.num_heads,
        num_kv_heads=sizes.num_kv_heads,
        head_dim=config.head_width,
        inner_size=sizes.inner_size,
        experts=experts,
    )


def _with_block(model: Backbone, sizes: Sizes, config: Any) -> Backbone:
    block = model.block.clone(config=resized_block(model.block.config, sizes))
    per_layer = {
        name: tuple(values[layer] for layer in sizes.layers) for name, values in model.per_layer.items()
    }
    modules = {
        name: module.clone(config=config) if getattr(module, "config", None) is not None else module
        for name, module in (("embed", model.embed), ("head", model.head))
    }
    return dataclasses.replace(
        model, config=config, block=block, num_layers=len(sizes.layers), per_layer=per_layer, **modules
    )


def _for_stack(config: Any, sizes: Sizes) -> Any:
    """The configuration that the embeddings of one stack read: a table of positions has a column a head."""
    is_t5 = isinstance(config, T5Config)
    return dataclasses.replace(config, num_heads=sizes.num_heads) if is_t5 else config


def _t5(model: Backbone, sizes: Sizes, encoder: Sizes | None) -> T5Config:
    config = model.config
    alone = model.encoder is None and getattr(model.embed, "side", "decoder") == "encoder"
    named = {"num_layers" if alone else "num_decoder_layers": len(sizes.layers)}
    stacks = [sizes]
    if encoder is not None:
        named["num_layers"] = len(encoder.layers)
        stacks.append(encoder)
    # A setting that the stacks share is that of both, or not said.
    for name, of in (("num_heads", lambda own: own.num_heads), ("d_ff", lambda own: own.inner_size)):
        found = {of(own) for own in stacks}
        if len(found) == 1:
            named[name] = found.pop()
    return dataclasses.replace(config, **named, values={**config.values, **named})


def _decoder(config: DecoderConfig, sizes: Sizes) -> DecoderConfig:
    names = NAMES.get(config.model_type, LLAMA)
    block = resized_block(config.block, sizes)
    windows = tuple(config.windows[layer] for layer in sizes.layers) if config.windows else ()
    said: dict[str, Any] = {"num_layers": len(sizes.layers), "inner_size": sizes.inner_size}
    if "head_dim" in names and (block.num_heads, block.kv_heads) != (
        config.block.num_heads,
        config.block.kv_heads,
    ):
        said |= {
            "num_heads": sizes.num_heads,
            "num_kv_heads": sizes.num_kv_heads,
            "head_dim": block.head_width,
        }
    if sizes.experts is not None:
        said["experts"] = sizes.experts
    values = {**config.values, **{names[name]: value for name, value in said.items()}}
    if sizes.experts is not None and "num_local_experts" in config.values:
        values["num_local_experts"] = sizes.experts
    values |= _layer_types(config.values, windows, sizes.layers)
    return dataclasses.replace(
        config, num_layers=len(sizes.layers), block=block, windows=windows, values=values
    )


def _layer_types(
    values: Mapping[str, Any], windows: tuple[int | None, ...], layers: tuple[int, ...]
) -> dict[str, Any]:
    """Which of the layers that are left see a window, where the family's layers differ."""
    if windows:
        return {"layer_types": [FULL if window is None else SLIDING for window in windows]}
    if values.get("layer_types"):
        return {"layer_types": [values["layer_types"][layer] for layer in layers]}
    return {}
