"""The configuration of BERT and its like, read from and written to Hugging Face's `config.json`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from peftjax.backbone.layers import ACTIVATIONS
from peftjax.core.errors import PeftError
from peftjax.models.family import (
    label_names,
    read_labels,
    require_known,
    require_rate,
    require_settings,
    require_size,
    write_labels,
)

# Settings that would change the computation, with the only value this backbone computes.
REQUIRED = {
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
}
SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "type_vocab_size",
)
RATES = ("hidden_dropout_prob", "attention_probs_dropout_prob")


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """The settings of `config.json` that BERT and its like read, with Hugging Face's defaults for BERT.

    `tied` says whether the output layer of masked words is the word table.

    Raises:
        PeftError: for a size that is not a positive integer, a width the heads do not divide, a
            dropout rate outside [0, 1), or an unknown activation.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    labels: tuple[str, ...] = ("LABEL_0", "LABEL_1")
    model_type: str = "bert"
    tied: bool = True

    def __post_init__(self) -> None:
        for name in SIZES:
            require_size(self.model_type, name, getattr(self, name))
        if self.hidden_size % self.num_attention_heads:
            raise PeftError(
                f"{self.model_type}: hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        for name in RATES:
            require_rate(self.model_type, name, getattr(self, name))
        if self.classifier_dropout is not None:
            require_rate(self.model_type, "classifier_dropout", self.classifier_dropout)
        for name in ("initializer_range", "layer_norm_eps"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or value <= 0.0:
                raise PeftError(f"{self.model_type}: {name} must be a positive number, not {value!r}")
        require_known(self.model_type, "hidden_act", self.hidden_act, ACTIVATIONS)

    @property
    def head_dropout(self) -> float:
        """The dropout rate before a classifier."""
        if self.classifier_dropout is None:
            return self.hidden_dropout_prob
        return self.classifier_dropout

    def with_num_labels(self, num_labels: int) -> BertConfig:
        """The same configuration with `num_labels` labels, whose names are kept if they fit."""
        return dataclasses.replace(self, labels=label_names(self.labels, num_labels))


def read_config(values: Mapping[str, Any]) -> BertConfig:
    """The configuration in the content of a `config.json`.

    Raises:
        PeftError: for a setting this backbone does not compute, and as `BertConfig`.
    """
    require_settings(values.get("model_type", BertConfig.model_type), values, REQUIRED)
    names = {field.name for field in dataclasses.fields(BertConfig)} - {"labels", "tied"}
    settings = {name: values[name] for name in names if name in values}
    settings["labels"] = read_labels(values)
    settings["tied"] = values.get("tie_word_embeddings") is not False
    return BertConfig(**settings)


def write_config(config: BertConfig) -> dict[str, Any]:
    """The content of `config.json` that gives `config` back."""
    values = dataclasses.asdict(config)
    labels, tied = values.pop("labels"), values.pop("tied")
    return {**values, "tie_word_embeddings": tied, **write_labels(labels)}
