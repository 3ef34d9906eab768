"""The models of the memory tables, from shapes alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from experiments.harness.memory import Model
from peftjax.backbone.backbone import Backbone
from peftjax.models import llama, roberta
from peftjax.models.decoder import decoder
from peftjax.models.named import named_config
from peftjax.models.vit import ViTConfig, vit

ROBERTA_LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "max_position_embeddings": 4098,
}


def roberta_model(name: str, values: Mapping[str, Any], batch: int, length: int) -> Model:
    """An encoder with a classifier, in float32."""

    def build(layers: int | None, dtype: str) -> Backbone:
        changed = {**values, "num_hidden_layers": layers or values["num_hidden_layers"]}
        return roberta.roberta(roberta.read_config(changed), head="classifier", dtype=dtype)

    return Model(name, build, batch, length, "float32")


def vit_model(name: str, config: ViTConfig, batch: int, classes: int = 1000) -> Model:
    """A vision transformer with a classifier, in float32."""

    def build(layers: int | None, dtype: str) -> Backbone:
        changed = dataclasses.replace(config, num_hidden_layers=layers or config.num_hidden_layers)
        return vit(changed.with_num_labels(classes), head="classifier", dtype=dtype)

    return Model(name, build, batch, None, "float32")


def llama_model(name: str, values: Mapping[str, Any], batch: int, length: int) -> Model:
    """A decoder in bfloat16, which predicts every token."""

    def build(layers: int | None, dtype: str) -> Backbone:
        changed = {**values, "num_hidden_layers": layers or values["num_hidden_layers"]}
        return decoder(llama.read_config(changed), head="causal_lm", dtype=dtype)

    return Model(name, build, batch, length, "bfloat16")


def roberta_large(length: int = 512) -> Model:
    """RoBERTa-large, 32 texts a step."""
    return roberta_model("RoBERTa-large", ROBERTA_LARGE, 32, length)


def block_models() -> tuple[Model, ...]:
    """What the methods of blocks are measured on."""
    return (
        roberta_large(),
        vit_model("ViT-L/16", ViTConfig(1024, 24, 16, 4096), 32),
        llama_model("Llama-3-8B", named_config("llama-3-8b"), 8, 2048),
    )


def vision_models() -> tuple[Model, ...]:
    """What the sparse methods are measured on."""
    return (
        vit_model("ViT-B/16", ViTConfig(768, 12, 12, 3072), 8),
        vit_model("ViT-L/16", ViTConfig(1024, 24, 16, 4096), 8),
        vit_model("ViT-H/14", ViTConfig(1280, 32, 16, 5120, patch_size=(14, 14)), 8),
    )


@dataclasses.dataclass(frozen=True)
class Size:
    """One of the Llamas of GaLore's pre-training runs.

    Attributes:
        name: as the paper calls it.
        width: of the model.
        inner: of the feed-forward.
        layers: blocks.
        heads: attention heads.
        rank: of projections and factors.
        paper: gigabytes of weights and optimizer state in the paper's table, of full training and GaLore.
    """

    name: str
    width: int
    inner: int
    layers: int
    heads: int
    rank: int
    paper: tuple[float, float] | None = None

    @property
    def model(self) -> Model:
        """The model on one row of 256 tokens."""
        length = 256
        values = {
            "model_type": "llama",
            "vocab_size": 32_000,
            "hidden_size": self.width,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "max_position_embeddings": length,
            "tie_word_embeddings": False,
        }
        return llama_model(self.name, values, 1, length)


SIZES = (
    Size("60M", 512, 1376, 8, 8, 128, (0.36, 0.24)),
    Size("130M", 768, 2048, 12, 12, 256, (0.76, 0.52)),
    Size("350M", 1024, 2736, 24, 16, 256, (2.06, 1.22)),
    Size("1B", 2048, 5461, 24, 32, 512, (7.80, 4.38)),
    Size("7B", 4096, 11008, 32, 32, 1024),
)
