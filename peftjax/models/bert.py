"""BERT (Devlin et al., 2019, arXiv:1810.04805): embeddings, heads and Hugging Face names."""

from __future__ import annotations

import re

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from peftjax.errors import PeftError
from peftjax.models.backbone import Backbone, Batch
from peftjax.models.bert_config import BertConfig, read_config, write_config
from peftjax.models.block import Block, BlockConfig
from peftjax.models.family import Family, Head
from peftjax.models.heads import (
    Classifier,
    Hidden,
    MaskedLM,
    MeanClassifier,
    MeanPool,
    Pooler,
)
from peftjax.models.layers import Context, Dropout, layer_norm
from peftjax.models.weight_map import Weight, embedding, linear, norm
from peftjax.tree import nearest

FEATURES = {"task": "FEATURE_EXTRACTION", "bare": True}
HEADS = {
    "none": Head("BertModel", **FEATURES),
    "mean": Head("BertModel", **FEATURES),
    "cls": Head("BertModel", **FEATURES),
    "classifier": Head("BertForSequenceClassification", "head/classifier/", labelled=True, task="SEQ_CLS"),
    "mean_classifier": Head("BertModel", "head/classifier/", labelled=True, **FEATURES),
    "masked_lm": Head(
        "BertForMaskedLM",
        "head/",
        tied=(
            Weight("embed/word/embedding", "cls.predictions.decoder.weight", kind="tied"),
            Weight("head/bias", "cls.predictions.decoder.bias", kind="tied"),
        ),
    ),
}

LAYER = "bert.encoder.layer.{layer}."
WEIGHTS: tuple[Weight, ...] = (
    embedding("embed/word", "bert.embeddings.word_embeddings"),
    embedding("embed/position", "bert.embeddings.position_embeddings"),
    embedding("embed/token_type", "bert.embeddings.token_type_embeddings"),
    *norm("embed/norm", "bert.embeddings.LayerNorm"),
    *linear("blocks/attention/query", LAYER + "attention.self.query"),
    *linear("blocks/attention/key", LAYER + "attention.self.key"),
    *linear("blocks/attention/value", LAYER + "attention.self.value"),
    *linear("blocks/attention/output", LAYER + "attention.output.dense"),
    *norm("blocks/attention_norm", LAYER + "attention.output.LayerNorm"),
    *linear("blocks/feed_forward/up", LAYER + "intermediate.dense"),
    *linear("blocks/feed_forward/down", LAYER + "output.dense"),
    *norm("blocks/feed_forward_norm", LAYER + "output.LayerNorm"),
    *linear("head/pooler", "bert.pooler.dense"),
    *linear("head/classifier", "classifier"),
    *linear("head/transform", "cls.predictions.transform.dense"),
    *norm("head/norm", "cls.predictions.transform.LayerNorm"),
    Weight("head/bias", "cls.predictions.bias"),
)
# Position indices, and copies of the tied word embedding and output bias.
IGNORED = r"bert\.embeddings\.position_ids|cls\.predictions\.decoder\.(weight|bias)"


class BertEmbed(nn.Module):
    """Word, position and token type embeddings, their norm and dropout."""

    config: BertConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, batch: Batch) -> tuple[Float[Array, "B S D"], Context]:
        """Embed `input_ids` [B, S]; the context is `mask` [B, S], True where a token is.

        Raises:
            PeftError: when S is longer than the position table.
        """
        ids = batch["input_ids"]
        length = ids.shape[1]
        if length > self.config.max_position_embeddings:
            raise PeftError(
                f"input_ids has {length} positions; this BERT has "
                f"{self.config.max_position_embeddings}: truncate the inputs"
            )

        def look_up(name: str, rows: int, ids: Array) -> Float[Array, "... D"]:
            init = nn.initializers.normal(self.config.initializer_range)
            table = nn.Embed(rows, self.config.hidden_size, embedding_init=init, name=name)
            # Cast the rows looked up, not the table, whose copy would be larger.
            return table(ids).astype(self.dtype)

        types = batch.get("token_type_ids", jnp.zeros_like(ids))
        hidden = look_up("word", self.config.vocab_size, ids)
        hidden += look_up("token_type", self.config.type_vocab_size, types)
        hidden += look_up("position", self.config.max_position_embeddings, jnp.arange(length))
        hidden = layer_norm(self.config.layer_norm_eps, self.dtype, "norm")(hidden)
        mask = batch.get("attention_mask", jnp.ones_like(ids)) != 0
        return Dropout(self.config.hidden_dropout_prob)(hidden), {"mask": mask}


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
        embed=BertEmbed(config, dtype),
        block=Block(block, dtype),
        head=bert_head(config, head, dtype),
        num_layers=config.num_hidden_layers,
        head_name=head,
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
            return MaskedLM(config.vocab_size, activation, epsilon, std, dtype)
    raise PeftError(f"BERT has no head {name!r}; closest: {nearest(name, HEADS)}")


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
    weights=WEIGHTS,
    canonical=canonical,
    ignored=IGNORED,
    prefix="bert.",
)
