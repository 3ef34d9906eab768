"""Vision Transformer (Dosovitskiy et al. 2021, arXiv 2010.11929): patches, heads and Hugging Face names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from peftjax.backbone.backbone import Backbone, Batch, Params
from peftjax.backbone.block import Block
from peftjax.backbone.block_config import BlockConfig
from peftjax.backbone.context import Context
from peftjax.backbone.layers import ACTIVATIONS, Dropout, dense, layer_norm
from peftjax.core.errors import PeftError
from peftjax.models.family import (
    FEATURES,
    Family,
    Head,
    label_names,
    read_labels,
    require_known,
    require_rate,
    require_size,
    write_labels,
)
from peftjax.models.weight_map import TensorEntry, convolution, linear, norm

HEADS = {
    "none": Head("ViTModel", **FEATURES),
    "mean": Head("ViTModel", **FEATURES),
    "cls": Head("ViTModel", **FEATURES),
    "classifier": Head("ViTForImageClassification", "head/classifier/", labeled=True),
}

LAYER = "vit.encoder.layer.{layer}."
WEIGHTS: tuple[TensorEntry, ...] = (
    TensorEntry("embed/class_token", "vit.embeddings.cls_token", leading=2),
    TensorEntry("embed/position/embedding", "vit.embeddings.position_embeddings", leading=1),
    *convolution("embed/patch_conv", "vit.embeddings.patch_embeddings.projection"),
    *norm("blocks/attention_norm", LAYER + "layernorm_before"),
    *linear("blocks/attention/query", LAYER + "attention.attention.query"),
    *linear("blocks/attention/key", LAYER + "attention.attention.key"),
    *linear("blocks/attention/value", LAYER + "attention.attention.value"),
    *linear("blocks/attention/output", LAYER + "attention.output.dense"),
    *norm("blocks/feed_forward_norm", LAYER + "layernorm_after"),
    *linear("blocks/feed_forward/up", LAYER + "intermediate.dense"),
    *linear("blocks/feed_forward/down", LAYER + "output.dense"),
    *norm("head/norm", "vit.layernorm"),
    *linear("head/pooler", "vit.pooler.dense"),
    *linear("head/classifier", "classifier"),
)
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "num_channels")
RATES = ("hidden_dropout_prob", "attention_probs_dropout_prob")


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """The settings of `config.json` that the computation reads, with Hugging Face's defaults.

    `image_size` and `patch_size` are (height, width).

    Raises:
        PeftError: for a size that is not a positive integer, a width the heads do not divide, a patch
            larger than the image, a dropout rate outside [0, 1), or an unknown activation.
    """

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    image_size: tuple[int, int] = (224, 224)
    patch_size: tuple[int, int] = (16, 16)
    num_channels: int = 3
    qkv_bias: bool = True
    pooler_output_size: int | None = None
    pooler_act: str = "tanh"
    labels: tuple[str, ...] = ("LABEL_0", "LABEL_1")
    model_type: str = "vit"

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in SIZES}
        for name in ("image_size", "patch_size"):
            pair = getattr(self, name)
            if not isinstance(pair, tuple) or len(pair) != 2:
                raise PeftError(f"vit: {name} must be one size or (height, width), not {pair!r}")
            sizes |= {f"{name}'s height": pair[0], f"{name}'s width": pair[1]}
        for name, size in sizes.items():
            require_size("vit", name, size)
        if min(self.grid) < 1:
            raise PeftError(f"vit: patch_size {self.patch_size} is larger than image_size {self.image_size}")
        if self.hidden_size % self.num_attention_heads:
            raise PeftError(
                f"vit: hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        for name in RATES:
            require_rate("vit", name, getattr(self, name))
        require_known("vit", "hidden_act", self.hidden_act, ACTIVATIONS)
        require_known("vit", "pooler_act", self.pooler_act, ACTIVATIONS)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches from top to bottom and from left to right."""
        return self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1]

    def with_num_labels(self, num_labels: int) -> ViTConfig:
        """The same configuration with `num_labels` labels, whose names are kept if they fit."""
        return dataclasses.replace(self, labels=label_names(self.labels, num_labels))


def read_config(values: Mapping[str, Any]) -> ViTConfig:
    """The configuration in the content of a `config.json`.

    Raises:
        PeftError: as `ViTConfig`.
    """
    names = {field.name for field in dataclasses.fields(ViTConfig)} - {"labels"}
    settings = {name: values[name] for name in names if name in values}
    for name in ("image_size", "patch_size"):
        if name in settings:
            size = settings[name]
            settings[name] = tuple(size) if isinstance(size, list | tuple) else (size, size)
    return ViTConfig(**settings, labels=read_labels(values))


def write_config(config: ViTConfig) -> dict[str, Any]:
    """The content of `config.json` that gives `config` back."""
    values = dataclasses.asdict(config)
    labels = values.pop("labels")
    for name in ("image_size", "patch_size"):
        height, width = values[name]
        values[name] = height if height == width else [height, width]
    return {**values, **write_labels(labels)}


class ViTEmbed(nn.Module):
    """Patches by a convolution, a class token before them, learned positions, dropout."""

    config: ViTConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, batch: Batch) -> tuple[Float[Array, "B S D"], Context]:
        """Embed `pixel_values` [B, C, H, W]: S is 1 + the number of patches, and the context is empty.

        Raises:
            PeftError: when the images have another size than the configuration's.
        """
        config, images = self.config, batch["pixel_values"]
        wanted = (config.num_channels, *config.image_size)
        if images.shape[1:] != wanted:
            raise PeftError(
                f"pixel_values has images of {list(images.shape[1:])} (channels, height, width); this vit "
                f"model takes {list(wanted)}: resize them"
            )
        init = nn.initializers.normal(config.initializer_range)
        # Not a linear layer to "all-linear", hence "conv" in the name.
        patches = nn.Conv(
            config.hidden_size,
            config.patch_size,
            strides=config.patch_size,
            padding="VALID",
            kernel_init=init,
            dtype=self.dtype,
            name="patch_conv",
        )(images.astype(self.dtype).transpose(0, 2, 3, 1))
        patches = patches.reshape(len(images), -1, config.hidden_size)
        first = self.param("class_token", init, (config.hidden_size,)).astype(self.dtype)
        first = jnp.broadcast_to(first, (len(images), 1, config.hidden_size))
        hidden = jnp.concatenate([first, patches], axis=1)
        rows = hidden.shape[1]
        table = nn.Embed(rows, config.hidden_size, embedding_init=init, name="position")
        hidden += table(jnp.arange(rows)).astype(self.dtype)
        return Dropout(config.hidden_dropout_prob)(hidden), Context()


class ViTHead(nn.Module):
    """The last norm, and what reads it."""

    config: ViTConfig
    kind: str
    dtype: DTypeLike

    @nn.compact
    def __call__(self, hidden: Array, context: Context, embed: Params) -> Array:
        """Class logits [B, C], the pooled class token [B, P], the mean patch [B, D] or all [B, S, D]."""
        config, std = self.config, self.config.initializer_range
        hidden = layer_norm(config.layer_norm_eps, self.dtype, "norm")(hidden)
        match self.kind:
            case "classifier":
                return dense(len(config.labels), std, self.dtype, "classifier")(hidden[:, 0])
            case "cls":
                width = config.pooler_output_size or config.hidden_size
                pooled = dense(width, std, self.dtype, "pooler")(hidden[:, 0])
                return ACTIVATIONS[config.pooler_act](pooled)
            case "mean":
                return hidden[:, 1:].mean(axis=1, dtype=jnp.float32).astype(self.dtype)
        return hidden


def vit(
    config: ViTConfig, *, head: str = "none", dtype: str = "float32", remat: str | None = None
) -> Backbone:
    """Build ViT with one of its heads; its batch is `pixel_values` [B, C, H, W].

    Args:
        config: the sizes and rates.
        head: "none" (states [B, 1 + patches, D] after the last norm, the class token first), "cls"
            (Hugging Face's pooler [B, P]), "mean" (mean over the patches, without the class token,
            [B, D]) or "classifier" (`ViTForImageClassification`, logits [B, C]).
        dtype: compute dtype of `Backbone`.
        remat: checkpoint policy of `Backbone`.

    Raises:
        PeftError: for an unknown head, and as `Backbone`.
    """
    require_known("vit", "head", head, HEADS)
    block = BlockConfig(
        width=config.hidden_size,
        num_heads=config.num_attention_heads,
        inner_size=config.intermediate_size,
        activation=config.hidden_act,
        norm_epsilon=config.layer_norm_eps,
        qkv_bias=config.qkv_bias,
        attention_dropout=config.attention_probs_dropout_prob,
        output_dropout=config.hidden_dropout_prob,
        init_std=config.initializer_range,
    )
    image = (1, config.num_channels, *config.image_size)
    return Backbone(
        config=config,
        embed=ViTEmbed(config, dtype),
        block=Block(block, dtype),
        head=ViTHead(config, head, dtype),
        num_layers=config.num_hidden_layers,
        head_name=head,
        remat=remat,
        dtype=dtype,
        example={"pixel_values": jax.ShapeDtypeStruct(image, jnp.float32)},
    )


# A checkpoint's spelling and that of a model in memory, which `transformers` 5 changed.
SPELLINGS = (
    ("vit.encoder.layer.", "vit.layers."),
    (".attention.attention.query", ".attention.q_proj"),
    (".attention.attention.key", ".attention.k_proj"),
    (".attention.attention.value", ".attention.v_proj"),
    (".attention.output.dense", ".attention.o_proj"),
    (".intermediate.dense", ".mlp.fc1"),
    (".output.dense", ".mlp.fc2"),
)


def canonical(name: str) -> str:
    """Hugging Face's spelling in files: the `vit.` prefix, which a base model's checkpoint lacks."""
    name = name if name.startswith(("vit.", "classifier.")) else f"vit.{name}"
    for in_file, in_model in SPELLINGS:
        name = name.replace(in_model, in_file)
    return name


def in_memory(name: str) -> str:
    """The spelling of a model in memory."""
    for in_file, in_model in SPELLINGS:
        name = name.replace(in_file, in_model)
    return name


VIT = Family(
    name=ViTConfig.model_type,
    read_config=read_config,
    write_config=write_config,
    build=vit,
    heads=HEADS,
    weights=WEIGHTS,
    canonical=canonical,
    prefix="vit.",
    in_memory=in_memory,
)
