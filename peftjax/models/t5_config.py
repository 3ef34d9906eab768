"""T5's configuration, read from and written to Hugging Face's `config.json`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from peftjax.backbone.block_config import BlockConfig
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
REQUIRED = {"is_decoder": False, "tie_encoder_decoder": False}
SIZES = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Config:
    """The settings of `config.json` that T5's computation reads, under Hugging Face's names.

    Attributes:
        model_type: "t5" or "mt5".
        vocab_size: V.
        d_model: D of both residual streams.
        d_kv: H of a head.
        d_ff: F of the feed-forwards.
        num_layers: blocks of the encoder.
        num_decoder_layers: blocks of the decoder.
        num_heads: N.
        activation: a name in `ACTIVATIONS`.
        gated: whether the feed-forwards are gated (T5 1.1, Flan-T5, mT5).
        relative_attention_num_buckets: rows of a stack's table of relative positions.
        relative_attention_max_distance: distance from which on all share a row.
        dropout_rate: of everything in the blocks and around them.
        classifier_dropout: rate before the layers of a classifier.
        layer_norm_epsilon: added to the mean square.
        initializer_factor: factor of the deviation of new parameters.
        tied: whether the output layer is the embedding table.
        apart: whether encoder and decoder each have an embedding table, which `config.json` never says.
        scaled_output: whether the states are multiplied by `D ** -0.5` before the output layer (T5 1.0).
        pad_token_id: stands in `decoder_input_ids` for a label that is no token.
        eos_token_ids: a classifier reads the last one of these.
        decoder_start_token_id: first of the `decoder_input_ids` made from labels.
        labels: names of a classifier's labels.
        values: the content of `config.json` it was read from.

    Raises:
        PeftError: for a size that is not a positive integer, a dropout rate outside [0, 1), or relative
            positions that leave a stack without near or without far buckets.
    """

    model_type: str
    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_decoder_layers: int
    num_heads: int
    activation: str
    gated: bool
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float = 0.1
    classifier_dropout: float = 0.0
    layer_norm_epsilon: float = 1e-6
    initializer_factor: float = 1.0
    tied: bool = True
    apart: bool = False
    scaled_output: bool = True
    pad_token_id: int | None = 0
    eos_token_ids: tuple[int, ...] = (1,)
    decoder_start_token_id: int | None = None
    labels: tuple[str, ...] = ("LABEL_0", "LABEL_1")
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False, hash=False)

    def __post_init__(self) -> None:
        model_type = self.model_type
        positions = ("relative_attention_num_buckets", "relative_attention_max_distance")
        for name in (*SIZES, "num_decoder_layers", *positions):
            require_size(model_type, name, getattr(self, name))
        for name in ("dropout_rate", "classifier_dropout"):
            require_rate(model_type, name, getattr(self, name))
        buckets, farthest = self.relative_attention_num_buckets, self.relative_attention_max_distance
        if buckets < 4 or farthest <= buckets // 2:
            raise PeftError(
                f"{model_type}: relative_attention_num_buckets {buckets} must be at least 4 and less than "
                f"twice relative_attention_max_distance {farthest}"
            )
        require_known(model_type, "feed_forward_proj", self.activation, ACTIVATIONS)

    def block(self, *, decoder: bool) -> BlockConfig:
        """The blocks of one of the stacks."""
        return BlockConfig(
            width=self.d_model,
            num_heads=self.num_heads,
            head_dim=self.d_kv,
            inner_size=self.d_ff,
            activation=self.activation,
            gated=self.gated,
            norm="rms",
            norm_epsilon=self.layer_norm_epsilon,
            qkv_bias=False,
            output_bias=False,
            feed_forward_bias=False,
            cross_attention=decoder,
            causal=decoder,
            query_scale=1.0,
            attention_dropout=self.dropout_rate,
            output_dropout=self.dropout_rate,
            inner_dropout=self.dropout_rate,
            init_std=self.initializer_factor,
            scaled_init=True,
        )

    def with_num_labels(self, num_labels: int) -> T5Config:
        """The same configuration with `num_labels` labels, whose names are kept if they fit."""
        return dataclasses.replace(self, labels=label_names(self.labels, num_labels))


def read_config(values: Mapping[str, Any]) -> T5Config:
    """The configuration in the content of a `config.json`.

    Raises:
        PeftError: for a setting this backbone does not compute, and as `T5Config`.
    """
    model_type = values["model_type"]
    require_settings(model_type, values, REQUIRED)
    for name in SIZES:
        if name not in values:
            raise PeftError(f"{model_type}: config.json has no {name}")
    default = "gated-gelu" if model_type == "mt5" else "relu"
    gated, activation = _feed_forward(model_type, values.get("feed_forward_proj", default))
    eos = values.get("eos_token_id", 1)
    tied = values.get("tie_word_embeddings") is not False
    names = {field.name for field in dataclasses.fields(T5Config)}
    settings = {name: values[name] for name in (names - {"apart"}) & values.keys()}
    settings |= {
        "activation": values.get("dense_act_fn", activation),
        "gated": values.get("is_gated_act", gated),
        "num_decoder_layers": values.get("num_decoder_layers") or values["num_layers"],
        "tied": tied,
        # mT5 never scales; transformers 5 writes whether T5 does, since it calls every T5 tied.
        "scaled_output": model_type == "t5" and values.get("scale_decoder_outputs", tied),
        "eos_token_ids": () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        "decoder_start_token_id": values.get("decoder_start_token_id", 0 if model_type == "mt5" else None),
        "labels": read_labels(values),
        "values": dict(values),
    }
    return T5Config(**settings)


def _feed_forward(model_type: str, setting: str) -> tuple[bool, str]:
    """Whether it is gated, and the activation, of `ACTIVATION` or `gated-ACTIVATION`."""
    kind, _, activation = setting.rpartition("-")
    if kind not in ("", "gated"):
        raise PeftError(
            f"{model_type}: feed_forward_proj {setting!r} is neither an activation nor 'gated-' and one"
        )
    return kind == "gated", "gelu_new" if setting == "gated-gelu" else activation


def write_config(config: T5Config) -> dict[str, Any]:
    """The content of `config.json` that gives `config` back: what was read, with its labels."""
    scaled = {"scale_decoder_outputs": config.scaled_output} if config.model_type == "t5" else {}
    return {
        **config.values,
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tied,
        **scaled,
        **write_labels(config.labels),
    }
