"""RoBERTa (Liu et al. 2019, arXiv 1907.11692) and XLM-R (Conneau et al. 2020, arXiv 1911.02116).

BERT with positions counted from the padding token's id, and heads of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Int

from peftjax.backbone.backbone import Backbone, Batch
from peftjax.backbone.heads import Classifier, MaskedLM
from peftjax.core.errors import PeftError
from peftjax.models import bert_config
from peftjax.models.bert import BertEmbed, bert_head, body_weights, encoder, with_output
from peftjax.models.bert_config import BertConfig, write_config
from peftjax.models.family import FEATURES, Family, Head, require_length, with_prefix
from peftjax.models.weight_map import TensorEntry, linear, norm

WEIGHTS: tuple[TensorEntry, ...] = (
    *body_weights("roberta."),
    *linear("head/dense", "classifier.dense"),
    *linear("head/classifier", "classifier.out_proj"),
    *linear("head/transform", "lm_head.dense"),
    *norm("head/norm", "lm_head.layer_norm"),
    TensorEntry("head/bias", "lm_head.bias"),
)
UNTIED: tuple[TensorEntry, ...] = (
    linear("head/output", "lm_head.decoder")[0],
    TensorEntry("head/bias", "lm_head.decoder.bias"),
)
# Position indices.
IGNORED = r"roberta\.embeddings\.position_ids"
# Where Hugging Face's defaults are not BERT's.
DEFAULTS = {"vocab_size": 50265, "pad_token_id": 1}


def positions_of_tokens(config: BertConfig, batch: Batch) -> Int[Array, "B S"]:
    """`p + n` for the n-th token of a row, n = 1, 2 ..., and p, the padding token's id, for padding.

    What is padding is read from `input_ids`, as `transformers` does, not from the mask.

    Raises:
        PeftError: when S is longer than the position table has rows after p.
    """
    ids, pad = batch["input_ids"], config.pad_token_id
    require_length(config.model_type, ids.shape[1], config.max_position_embeddings - pad - 1)
    tokens = (ids != pad).astype(jnp.int32)
    return jnp.cumsum(tokens, axis=1) * tokens + pad


def read_config(values: Mapping[str, Any]) -> BertConfig:
    """The configuration in the content of a `config.json`.

    Raises:
        PeftError: for a setting this backbone does not compute, and as `BertConfig`.
    """
    return bert_config.read_config({**DEFAULTS, **values})


def roberta(
    config: BertConfig, *, head: str = "none", dtype: str = "float32", remat: str | None = None
) -> Backbone:
    """Build RoBERTa or XLM-R with one of its heads.

    Args:
        config: the sizes and rates.
        head: as of `peftjax.models.bert.bert`; "classifier" is `RobertaForSequenceClassification`,
            "masked_lm" is `RobertaForMaskedLM`.
        dtype: compute dtype of `Backbone`.
        remat: checkpoint policy of `Backbone`.

    Raises:
        PeftError: for an unknown head, for a padding token without a row in the position table, and as
            `Backbone`.
    """
    pad, last = config.pad_token_id, config.max_position_embeddings - 2
    if not isinstance(pad, int) or not 0 <= pad <= last:
        raise PeftError(
            f"{config.model_type}: positions are counted from pad_token_id, which must be in [0, {last}], "
            f"not {pad!r}"
        )
    embed = BertEmbed(config, dtype, positions_of_tokens)
    return encoder(config, embed, _head(config, head, dtype), name=head, dtype=dtype, remat=remat)


def _head(config: BertConfig, name: str, dtype: DTypeLike) -> Any:
    std, rate = config.initializer_range, config.head_dropout
    match name:
        case "classifier":
            return Classifier(len(config.labels), rate, std, dtype, first="dense", input_dropout=rate)
        case "masked_lm":
            # Always the exact gelu, whatever the blocks' activation is.
            return MaskedLM(config.vocab_size, "gelu", config.layer_norm_eps, std, dtype, config.tied)
    return bert_head(config, name, dtype)


def _heads(classes: str) -> dict[str, Head]:
    features = Head(f"{classes}Model", **FEATURES)
    tied = (
        TensorEntry("embed/word/embedding", "lm_head.decoder.weight", kind="tied"),
        TensorEntry("head/bias", "lm_head.decoder.bias", kind="tied"),
        TensorEntry("head/bias", "lm_head.bias", kind="tied"),
    )
    return {
        "none": features,
        "mean": features,
        "cls": features,
        "classifier": Head(f"{classes}ForSequenceClassification", "head/", labeled=True, task="SEQ_CLS"),
        "mean_classifier": Head(f"{classes}Model", "head/classifier/", labeled=True, **FEATURES),
        "masked_lm": Head(f"{classes}ForMaskedLM", "head/", tied=tied),
    }


ROBERTA = Family(
    name="roberta",
    read_config=read_config,
    write_config=write_config,
    build=roberta,
    heads=_heads("Roberta"),
    weights=with_output(WEIGHTS, UNTIED),
    canonical=with_prefix("roberta.", "lm_head.", "classifier."),
    ignored=IGNORED,
    prefix="roberta.",
)
XLM_ROBERTA = dataclasses.replace(ROBERTA, name="xlm-roberta", heads=_heads("XLMRoberta"))
