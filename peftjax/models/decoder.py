"""A decoder: embeddings, causal blocks, a norm and an output layer; a family is a `DecoderConfig`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from peftjax.backbone.backbone import Backbone, Batch, Params
from peftjax.backbone.block import Block
from peftjax.backbone.block_config import BlockConfig, make_norm
from peftjax.backbone.context import Context, Rotation
from peftjax.backbone.heads import OutputKernel, mean_pool
from peftjax.backbone.layers import Dropout, dense
from peftjax.backbone.logits import Logits
from peftjax.backbone.rope import rotation
from peftjax.core.errors import PeftError
from peftjax.models.family import (
    FEATURES,
    Head,
    label_names,
    require_known,
    require_length,
    require_rate,
    require_size,
    write_labels,
)
from peftjax.models.vocabulary import row_ids
from peftjax.models.weight_map import TensorEntry

ALL_PLACES = 2**31 - 1
"""A window that hides nothing, for layers without one among layers with one."""
FULL, SLIDING = "full_attention", "sliding_attention"
LAYER_TYPES = (FULL, SLIDING)
HEADS = ("causal_lm", "classifier", "mean", "none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearnedPositions:
    """A position table [offset + max_positions, D] added to the embeddings: position p is row p + offset.

    Attributes:
        offset: rows before that of position 0.
        by_mask: whether only tokens are counted, and padding has position -1, where a batch has a mask
            and no `position_ids`.
    """

    offset: int = 0
    by_mask: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """What differs between the decoders of the families.

    Attributes:
        model_type: Hugging Face's name of the family.
        vocab_size: V.
        num_layers: blocks.
        block: what differs between their blocks.
        max_positions: longest sequence the checkpoint was made for.
        rope: Hugging Face's `rope_parameters`, None without rotary positions.
        windows: how many places back each layer sees, None is all, where the layers differ; if they do
            not, empty, and the block's `window` holds.
        local_rope: the `rope_parameters` of the layers with a window, where those are others.
        learned_positions: the position table, None without one.
        embedding_width: E of the word embeddings and of the output layer, with a projection between
            them and the blocks; None is the blocks' D, without projections.
        embedding_dropout: rate on what enters the first block.
        final_norm: whether there is a norm after the last block.
        tied: whether the output layer is the embedding table.
        embedding_scale: factor of the embeddings.
        logit_softcap: bound of the logits.
        pad_token_id: the padding token; a classifier reads the last token before it.
        labels: names of a classifier's labels.
        values: the content of `config.json` it was read from.
    """

    model_type: str
    vocab_size: int
    num_layers: int
    block: BlockConfig
    max_positions: int
    rope: Mapping[str, Any] | None = dataclasses.field(default=None, hash=False)
    windows: tuple[int | None, ...] = ()
    local_rope: Mapping[str, Any] | None = dataclasses.field(default=None, hash=False)
    learned_positions: LearnedPositions | None = None
    embedding_width: int | None = None
    embedding_dropout: float = 0.0
    final_norm: bool = True
    tied: bool = False
    embedding_scale: float = 1.0
    logit_softcap: float | None = None
    pad_token_id: int | None = None
    labels: tuple[str, ...] = ("LABEL_0", "LABEL_1")
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False, hash=False)

    def __post_init__(self) -> None:
        for name in ("vocab_size", "num_layers", "max_positions"):
            require_size(self.model_type, name, getattr(self, name))
        block = self.block
        for name in ("width", "num_heads", "inner_size", "kv_heads", "head_width"):
            require_size(self.model_type, name, getattr(block, name))
        if self.embedding_width is not None:
            require_size(self.model_type, "embedding_width", self.embedding_width)
        require_rate(self.model_type, "embedding_dropout", self.embedding_dropout)
        for name in ("attention_dropout", "output_dropout"):
            require_rate(self.model_type, name, getattr(block, name))
        if block.num_heads % block.kv_heads:
            raise PeftError(
                f"{self.model_type}: num_key_value_heads {block.kv_heads} does not divide "
                f"num_attention_heads {block.num_heads}"
            )
        if block.head_dim is None and block.width % block.num_heads:
            raise PeftError(
                f"{self.model_type}: num_attention_heads {block.num_heads} does not divide "
                f"hidden_size {block.width}"
            )
        if block.rotary and block.head_width % 2:
            raise PeftError(f"{self.model_type}: rotary positions need an even head_dim")
        if self.windows and len(self.windows) != self.num_layers:
            raise PeftError(f"{self.model_type}: {len(self.windows)} windows for {self.num_layers} layers")

    def with_num_labels(self, num_labels: int) -> DecoderConfig:
        """The same configuration with `num_labels` labels, whose names are kept if they fit."""
        return dataclasses.replace(self, labels=label_names(self.labels, num_labels))


class DecoderEmbed(nn.Module):
    """Word and position embeddings, and what the blocks share: mask, segments, rotation."""

    config: DecoderConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, batch: Batch) -> tuple[Float[Array, "B S D"], Context]:
        """Embed a batch.

        Args:
            batch: `input_ids` [B, S] int32, and optionally `attention_mask` [B, S] (1 = token),
                `position_ids` [B, S] (default 0 ... S - 1, as in `transformers`) and `segment_ids`
                [B, S]: tokens of other segments are not seen.

        Raises:
            PeftError: when S is longer than a position table, without `position_ids`.
        """
        config, ids = self.config, batch["input_ids"]
        block = config.block

        def look_up(name: str, rows: int, width: int, ids: Array) -> Float[Array, "... W"]:
            init = nn.initializers.normal(block.init_std)
            table = nn.Embed(rows, width, embedding_init=init, name=name)
            # Cast the rows looked up, not the table, whose copy would be larger.
            return table(ids).astype(self.dtype)

        known = row_ids(batch, ids, config.vocab_size)
        hidden = look_up("word", config.vocab_size, config.embedding_width or block.width, known)
        if config.embedding_scale != 1.0:
            hidden = hidden * jnp.asarray(config.embedding_scale, self.dtype)
        if config.embedding_width is not None:
            hidden = dense(block.width, block.init_std, self.dtype, "project_in", bias=False)(hidden)
        if config.learned_positions is not None:
            offset = config.learned_positions.offset
            rows = position_ids(config, batch) + offset
            hidden += look_up("position", config.max_positions + offset, block.width, rows)
        hidden = Dropout(config.embedding_dropout)(hidden)

        def turn(rope: Mapping[str, Any] | None) -> Rotation | None:
            if rope is None:
                return None
            positions = batch.get("position_ids", jnp.arange(ids.shape[1])[None])
            return rotation(positions, block.head_width, rope, config.max_positions)

        return hidden, Context(
            mask=batch["attention_mask"] != 0 if "attention_mask" in batch else None,
            segments=batch.get("segment_ids"),
            rotation=turn(config.rope),
            local_rotation=turn(config.local_rope),
            last=last_token(batch, config.pad_token_id),
        )


def position_ids(config: DecoderConfig, batch: Batch) -> Int[Array, "#B S"]:
    """The position of every token in a learned table: `position_ids`, else its place or its count.

    Raises:
        PeftError: when S is longer than the table, without `position_ids`.
    """
    if "position_ids" in batch:
        return batch["position_ids"]
    length = batch["input_ids"].shape[1]
    require_length(config.model_type, length, config.max_positions)
    if config.learned_positions.by_mask and "attention_mask" in batch:
        mask = (batch["attention_mask"] != 0).astype(jnp.int32)
        return jnp.cumsum(mask, axis=1) * mask - 1
    return jnp.arange(length)[None]


def last_token(batch: Batch, pad_token_id: int | None) -> Array:
    """The place of each row's last token, [B]: by the padding token or, without one, by the mask."""
    ids = batch["input_ids"]
    mask = batch.get("attention_mask", jnp.ones_like(ids))
    is_token = mask if pad_token_id is None else ids != pad_token_id
    return jnp.max(jnp.where(is_token != 0, jnp.arange(ids.shape[1]), 0), axis=1)


class DecoderHead(nn.Module):
    """The last norm, and what reads it: `Logits`, a classifier on the last token, or nothing."""

    config: DecoderConfig
    kind: str
    dtype: DTypeLike

    @nn.compact
    def __call__(self, hidden: Array, context: Context, embed: Params) -> Array | Logits:
        """`Logits` [B, S, V], class logits [B, C], mean states [B, E] or states [B, S, E]."""
        config, block = self.config, self.config.block
        width = config.embedding_width or block.width
        if config.final_norm:
            hidden = make_norm(block, self.dtype, "norm")(hidden)
        if config.embedding_width is not None:
            hidden = dense(width, block.init_std, self.dtype, "project_out", bias=False)(hidden)
        match self.kind:
            case "causal_lm" if config.tied:
                return Logits(hidden, embed["word"]["embedding"], softcap=config.logit_softcap, tied=True)
            case "causal_lm":
                kernel = OutputKernel(width, config.vocab_size, block.init_std, name="output")()
                return Logits(hidden, kernel, softcap=config.logit_softcap)
            case "classifier":
                last = jnp.take_along_axis(hidden, context.last[:, None, None], axis=1)[:, 0]
                return dense(len(config.labels), block.init_std, self.dtype, "classifier", bias=False)(last)
            case "mean":
                return mean_pool(hidden, context.mask)
        return hidden


def decoder(
    config: DecoderConfig, *, head: str = "causal_lm", dtype: str = "float32", remat: str | None = None
) -> Backbone:
    """Build a decoder.

    Args:
        config: the family's differences and the sizes.
        head: "causal_lm" (`Logits` [B, S, V]), "classifier" (logits [B, C] of the last token),
            "mean" (mean over the tokens [B, D]) or "none" (states [B, S, D] after the last norm).
        dtype: compute dtype of `Backbone`.
        remat: checkpoint policy of `Backbone`.

    Raises:
        PeftError: for an unknown head, and as `Backbone`.
    """
    require_known(config.model_type, "head", head, HEADS)
    return Backbone(
        config=config,
        embed=DecoderEmbed(config, dtype),
        block=Block(config.block, dtype),
        head=DecoderHead(config, head, dtype),
        num_layers=config.num_layers,
        head_name=head,
        remat=remat,
        dtype=dtype,
        per_layer=layer_differences(config),
    )


def layer_differences(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """What differs between the layers, for `Backbone.per_layer`: `window`, and `local` with two ropes."""
    if not config.windows:
        return {}
    own = {"window": tuple(ALL_PLACES if window is None else window for window in config.windows)}
    if config.local_rope is not None:
        own["local"] = tuple(window is not None for window in config.windows)
    return own


def decoder_heads(causal_lm: str, classifier: str, base: str) -> dict[str, Head]:
    """The heads of a family by the names of its Hugging Face classes."""
    features = Head(base, **FEATURES)
    table = TensorEntry("embed/word/embedding", "lm_head.weight", kind="tied")
    return {
        "causal_lm": Head(causal_lm, task="CAUSAL_LM", tied=(table,)),
        "classifier": Head(classifier, "head/classifier/", labeled=True, task="SEQ_CLS"),
        "none": features,
        "mean": features,
    }


def write_config(config: DecoderConfig) -> dict[str, Any]:
    """The content of `config.json` that gives `config` back: what was read, with its labels.

    It names no dtype, which is that of the tensors saved with it, and no format of codes, which are not.
    """
    gone = ("dtype", "torch_dtype", "quantization_config")
    values = {name: value for name, value in config.values.items() if name not in gone}
    return {
        **values,
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tied,
        **write_labels(config.labels),
    }


def read_windows(values: Mapping[str, Any], layer_types: Sequence[str]) -> tuple[int | None, ...]:
    """How many places back each layer sees, None for all, [num_layers].

    Args:
        values: the content of `config.json`; its `layer_types` go before the argument.
        layer_types: the family's own order of "full_attention" and "sliding_attention".

    Raises:
        PeftError: for another type, another number of them than of layers, or no width of a window.
    """
    model_type, types = values["model_type"], values.get("layer_types") or layer_types
    for name in types:
        require_known(model_type, "layer_types", name, LAYER_TYPES)
    if len(types) != values["num_hidden_layers"]:
        raise PeftError(f"{model_type}: {len(types)} layer_types for {values['num_hidden_layers']} layers")
    window = values.get("sliding_window")
    if SLIDING in types and (not isinstance(window, int) or window < 1):
        raise PeftError(f"{model_type}: sliding_window must be a positive integer, not {window!r}")
    return tuple(window if name == SLIDING else None for name in types)


def window_settings(windows: tuple[int | None, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of `BlockConfig` and of `DecoderConfig` that give the layers these windows.

    A window that all layers share is part of the block: a static one lets attention skip the keys
    outside it.
    """
    if len(set(windows)) == 1:
        return {"window": windows[0]}, {}
    return {}, {"windows": windows}
