"""BERT (Devlin et al., 2019, arXiv:1810.04805): embeddings, heads and Hugging Face names."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from peftjax.backbone.backbone import Backbone, Batch
from peftjax.backbone.block import Block
from peftjax.backbone.block_config import BlockConfig
from peftjax.backbone.context import Context
from peftjax.backbone.heads import Classifier, Hidden, MaskedLM, MeanClassifier, MeanPool, Pooler
from peftjax.backbone.layers import Dropout, layer_norm
from peftjax.core.errors import PeftError
from peftjax.core.tree import nearest
from peftjax.models.bert_config import BertConfig, read_config, write_config
from peftjax.models.family import FEATURES, Family, Head, require_length
from peftjax.models.vocabulary import row_ids
from peftjax.models.weight_map import TensorEntry, embedding, linear, norm

HEADS = {
    "none": Head("BertModel", **FEATURES),
    "mean": Head("BertModel", **FEATURES),
    "cls": Head("BertModel", **FEATURES),
    "classifier": Head("BertForSequenceClassification", "head/classifier/", labeled=True, task="SEQ_CLS"),
    "mean_classifier": Head("BertModel", "head/classifier/", labeled=True, **FEATURES),
    "masked_lm": Head(
        "BertForMaskedLM",
        "head/",
        tied=(
            TensorEntry("embed/word/embedding", "cls.predictions.decoder.weight", kind="tied"),
            TensorEntry("head/bias", "cls.predictions.decoder.bias", kind="tied"),
            TensorEntry("head/bias", "cls.predictions.bias", kind="tied"),
        ),
    ),
}


def body_weights(prefix: str) -> tuple[TensorEntry, ...]:
    """The Hugging Face names of embeddings, blocks and pooler, which begin with `prefix`."""
    layer = prefix + "encoder.layer.{layer}."
    return (
        embedding("embed/word", f"{prefix}embeddings.word_embeddings"),
        embedding("embed/position", f"{prefix}embeddings.position_embeddings"),
        embedding("embed/token_type", f"{prefix}embeddings.token_type_embeddings"),
        *norm("embed/norm", f"{prefix}embeddings.LayerNorm"),
        *linear("blocks/attention/query", f"{layer}attention.self.query"),
        *linear("blocks/attention/key", f"{layer}attention.self.key"),
        *linear("blocks/attention/value", f"{layer}attention.self.value"),
        *linear("blocks/attention/output", f"{layer}attention.output.dense"),
        *norm("blocks/attention_norm", f"{layer}attention.output.LayerNorm"),
        *linear("blocks/feed_forward/up", f"{layer}intermediate.dense"),
        *linear("blocks/feed_forward/down", f"{layer}output.dense"),
        *norm("blocks/feed_forward_norm", f"{layer}output.LayerNorm"),
        *linear("head/pooler", f"{prefix}pooler.dense"),
    )


WEIGHTS: tuple[TensorEntry, ...] = (
    *body_weights("bert."),
    *linear("head/classifier", "classifier"),
    *linear("head/transform", "cls.predictions.transform.dense"),
    *norm("head/norm", "cls.predictions.transform.LayerNorm"),
    TensorEntry("head/bias", "cls.predictions.bias"),
)
UNTIED: tuple[TensorEntry, ...] = (
    linear("head/output", "cls.predictions.decoder")[0],
    TensorEntry("head/bias", "cls.predictions.decoder.bias"),
)
# Position indices.
IGNORED = r"bert\.embeddings\.position_ids"


def with_output(
    weights: tuple[TensorEntry, ...], untied: tuple[TensorEntry, ...]
) -> Callable[[Backbone], Any]:
    """A table with the names in `untied` in a model whose output layer is not its word table."""
    own = {weight.path: weight for weight in (*weights, *untied)}
    return lambda model: weights if model.config.tied else tuple(own.values())


Positions = Callable[[BertConfig, Batch], Int[Array, "#B S"]]


def positions_in_order(config: BertConfig, batch: Batch) -> Int[Array, "1 S"]:
    """Positions 0 ... S - 1.

    Raises:
        PeftError: when S is longer than the position table.
    """
    length = batch["input_ids"].shape[1]
    require_length(config.model_type, length, config.max_position_embeddings)
    return jnp.arange(length)[None]


class BertEmbed(nn.Module):
    """Word, position and token type embeddings, their norm and dropout."""

    config: BertConfig
    dtype: DTypeLike
    positions: Positions = positions_in_order

    @nn.compact
    def __call__(self, batch: Batch) -> tuple[Float[Array, "B S D"], Context]:
        """Embed a batch; the context is `mask` [B, S], True where a token is.

        Args:
            batch: `input_ids` [B, S] int32, and optionally `attention_mask` [B, S] (1 = token),
                `token_type_ids` [B, S] and `position_ids` [B, S] (rows of the position table).

        Raises:
            PeftError: when S is longer than the position table, without `position_ids`.
        """
        config, ids = self.config, batch["input_ids"]

        def look_up(name: str, rows: int, ids: Array) -> Float[Array, "... D"]:
            init = nn.initializers.normal(config.initializer_range)
            table = nn.Embed(rows, config.hidden_size, embedding_init=init, name=name)
            # Cast the rows looked up, not the table, whose copy would be larger.
            return table(ids).astype(self.dtype)

        types = batch.get("token_type_ids", jnp.zeros_like(ids))
        positions = batch["position_ids"] if "position_ids" in batch else self.positions(config, batch)
        hidden = look_up("word", config.vocab_size, row_ids(batch, ids, config.vocab_size))
        types = row_ids(batch, types, config.type_vocab_size, name="token_type_ids")
        hidden += look_up("token_type", config.type_vocab_size, types)
        if "position_ids" in batch:
            positions = row_ids(batch, positions, config.max_position_embeddings, name="position_ids")
        hidden += look_up("position", config.max_position_embeddings, positions)
        hidden = layer_norm(config.layer_norm_eps, self.dtype, "norm")(hidden)
        mask = batch.get("attention_mask", jnp.ones_like(ids)) != 0
        return Dropout(config.hidden_dropout_prob)(hidden), Context(mask=mask)


def bert(
    config: BertConfig,
    *,
    head: str = "none",
    dtype: str = "float32",
    remat: str | None = None,
) -> Backbone:
    """Build BERT with one of its heads.

    Args:
        config: the sizes and rates.
        head: "none" (hidden states [B, S, D]), "mean" (mean over the tokens [B, D]), "cls" (Hugging
            Face's pooler [B, D]), "classifier" (`BertForSequenceClassification`, logits [B, C]),
            "mean_classifier" (mean, then linear, logits [B, C]) or "masked_lm"
            (`BertForMaskedLM`, logits [B, S, V]).
        dtype: compute dtype of `Backbone`.
        remat: checkpoint policy of `Backbone`.

    Raises:
        PeftError: for an unknown head, and as `Backbone`.
    """
    return encoder(
        config, BertEmbed(config, dtype), bert_head(config, head, dtype), name=head, dtype=dtype, remat=remat
    )


def encoder(
    config: BertConfig, embed: nn.Module, head: nn.Module, *, name: str, dtype: str, remat: str | None
) -> Backbone:
    """BERT's blocks between `embed` and the `head` called `name`."""
    block = BlockConfig(
        width=config.hidden_size,
        num_heads=config.num_attention_heads,
        inner_size=config.intermediate_size,
        activation=config.hidden_act,
        norm_epsilon=config.layer_norm_eps,
        norm_order="post",
        attention_dropout=config.attention_probs_dropout_prob,
        output_dropout=config.hidden_dropout_prob,
        init_std=config.initializer_range,
    )
    return Backbone(
        config=config,
        embed=embed,
        block=Block(block, dtype),
        head=head,
        num_layers=config.num_hidden_layers,
        head_name=name,
        remat=remat,
        dtype=dtype,
    )


def bert_head(config: BertConfig, name: str, dtype: DTypeLike) -> nn.Module:
    """The head module called `name` in `HEADS`."""
    std, labels = config.initializer_range, len(config.labels)
    match name:
        case "none":
            return Hidden(dtype)
        case "mean":
            return MeanPool(dtype)
        case "cls":
            return Pooler(std, dtype)
        case "classifier":
            return Classifier(labels, config.head_dropout, std, dtype)
        case "mean_classifier":
            return MeanClassifier(labels, config.head_dropout, std, dtype)
        case "masked_lm":
            activation, epsilon = config.hidden_act, config.layer_norm_eps
            return MaskedLM(config.vocab_size, activation, epsilon, std, dtype, config.tied)
    raise PeftError(f"{config.model_type} has no head {name!r}; closest: {nearest(name, HEADS)}")


def canonical(name: str) -> str:
    """Hugging Face's present spelling: the `bert.` prefix, and `weight`, `bias` of a norm."""
    if not name.startswith(("bert.", "cls.", "classifier.")):
        name = f"bert.{name}"
    name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)
    return re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)


BERT = Family(
    name=BertConfig.model_type,
    read_config=read_config,
    write_config=write_config,
    build=bert,
    heads=HEADS,
    weights=with_output(WEIGHTS, UNTIED),
    canonical=canonical,
    ignored=IGNORED,
    prefix="bert.",
)
