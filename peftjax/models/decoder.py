"""A decoder: embeddings, causal blocks, a norm and an output layer; a family is a `DecoderConfig`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from peftjax.errors import PeftError
from peftjax.logits import Logits
from peftjax.models.backbone import Backbone, Batch, Params
from peftjax.models.block import Block, BlockConfig, make_norm
from peftjax.models.family import Head, label_names, require_known
from peftjax.models.heads import mean_pool
from peftjax.models.layers import Context, dense
from peftjax.models.rope import rotation

HEADS = ("causal_lm", "classifier", "mean", "none")


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
    rope: Mapping[str, Any] | None = None
    tied: bool = False
    embedding_scale: float = 1.0
    logit_softcap: float | None = None
    pad_token_id: int | None = None
    labels: tuple[str, ...] = ("LABEL_0", "LABEL_1")
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False, hash=False)

    def __post_init__(self) -> None:
        for name in ("vocab_size", "num_layers", "max_positions"):
            _require_size(self.model_type, name, getattr(self, name))
        block = self.block
        for name in ("width", "num_heads", "inner_size", "kv_heads", "head_width"):
            _require_size(self.model_type, name, getattr(block, name))
        if block.num_heads % block.kv_heads:
            raise PeftError(
                f"{self.model_type}: num_key_value_heads {block.kv_heads} does not divide "
                f"num_attention_heads {block.num_heads}"
            )
        if block.rotary and block.head_width % 2:
            raise PeftError(f"{self.model_type}: rotary positions need an even head_dim")

    def with_num_labels(self, num_labels: int) -> DecoderConfig:
        """The same configuration with `num_labels` labels, whose names are kept if they fit."""
        return dataclasses.replace(self, labels=label_names(self.labels, num_labels))


def _require_size(who: str, name: str, size: Any) -> None:
    if not isinstance(size, int) or size < 1:
        raise PeftError(f"{who}: {name} must be a positive integer, not {size!r}")


class DecoderEmbed(nn.Module):
    """Word embeddings, and what the blocks share: mask, positions, segments, rotation."""

    config: DecoderConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, batch: Batch) -> tuple[Float[Array, "B S D"], Context]:
        """Embed a batch.

        Args:
            batch: `input_ids` [B, S] int32, and optionally `attention_mask` [B, S] (1 = token),
                `position_ids` [B, S] (default 0 ... S - 1, as in `transformers`) and `segment_ids`
                [B, S]: tokens of other segments are not seen.
        """
        config, ids = self.config, batch["input_ids"]
        init = nn.initializers.normal(config.block.init_std)
        table = nn.Embed(config.vocab_size, config.block.width, embedding_init=init, name="word")
        # Cast the rows looked up, not the table, whose copy would be larger.
        hidden = table(ids).astype(self.dtype)
        if config.embedding_scale != 1.0:
            hidden = hidden * jnp.asarray(config.embedding_scale, self.dtype)
        context: Context = {"last": last_token(batch, config.pad_token_id)}
        if "attention_mask" in batch:
            context["mask"] = batch["attention_mask"] != 0
        if "segment_ids" in batch:
            context["segments"] = batch["segment_ids"]
        if config.rope is not None:
            positions = batch.get("position_ids", jnp.arange(ids.shape[1])[None])
            settings = (config.block.head_width, config.rope, config.max_positions)
            context["rotation"] = rotation(positions, *settings)
        return hidden, context


def last_token(batch: Batch, pad_token_id: int | None) -> Array:
    """The place of each row's last token, [B]: by the padding token or, without one, by the mask."""
    ids = batch["input_ids"]
    mask = batch.get("attention_mask", jnp.ones_like(ids))
    is_token = mask if pad_token_id is None else ids != pad_token_id
    return jnp.max(jnp.where(is_token != 0, jnp.arange(ids.shape[1]), 0), axis=1)


class OutputKernel(nn.Module):
    """An output layer's `kernel` [D, V], given away unread."""

    width: int
    vocab_size: int
    init_std: float

    @nn.compact
    def __call__(self) -> Float[Array, "D V"]:
        """The kernel."""
        shape = (self.width, self.vocab_size)
        return self.param("kernel", nn.initializers.normal(self.init_std), shape)


class DecoderHead(nn.Module):
    """The last norm, and what reads it: `Logits`, a classifier on the last token, or nothing."""

    config: DecoderConfig
    kind: str
    dtype: DTypeLike

    @nn.compact
    def __call__(self, hidden: Array, context: Context, embed: Params) -> Array | Logits:
        """`Logits` [B, S, V], class logits [B, C], mean states [B, D] or states [B, S, D]."""
        config, block = self.config, self.config.block
        hidden = make_norm(block, self.dtype, "norm")(hidden)
        match self.kind:
            case "causal_lm" if config.tied:
                return Logits(hidden, embed["word"]["embedding"], softcap=config.logit_softcap, tied=True)
            case "causal_lm":
                kernel = OutputKernel(block.width, config.vocab_size, block.init_std, name="output")()
                return Logits(hidden, kernel, softcap=config.logit_softcap)
            case "classifier":
                last = jnp.take_along_axis(hidden, context["last"][:, None, None], axis=1)[:, 0]
                return dense(len(config.labels), block.init_std, self.dtype, "classifier", bias=False)(last)
            case "mean":
                mask = context.get("mask", jnp.ones(hidden.shape[:2], bool))
                return mean_pool(hidden, mask)
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
    )


def decoder_heads(causal_lm: str, classifier: str, base: str) -> dict[str, Head]:
    """The heads of a family by the names of its Hugging Face classes."""
    return {
        "causal_lm": Head(causal_lm),
        "classifier": Head(classifier, "head/classifier/", labelled=True),
        "mean": Head(base),
        "none": Head(base),
    }


def write_config(config: DecoderConfig) -> dict[str, Any]:
    """The content of `config.json` that gives `config` back: what was read, with its labels."""
    return {
        **config.values,
        "model_type": config.model_type,
        "id2label": {str(i): label for i, label in enumerate(config.labels)},
        "label2id": {label: i for i, label in enumerate(config.labels)},
    }
