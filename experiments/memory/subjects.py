"""The models of the memory tables, from shapes alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from peftjax.backbone.backbone import Backbone
from peftjax.models import llama, roberta
from peftjax.models.decoder import decoder
from peftjax.models.vit import ViTConfig, vit

ROBERTA_LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "max_position_embeddings": 4098,
}
LLAMA_3_8B = {
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14_336,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "tie_word_embeddings": False,
}
VIT_LARGE = ViTConfig(1024, 24, 16, 4096)
CLASSES = 1000


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model and the batch of a step.

    Attributes:
        name: in the tables.
        build: `(number of layers, or None for the model's own) -> backbone`.
        batch: rows of a step.
        length: tokens of a row; None for images.
        dtype: of parameters, optimizer state and computation.
    """

    name: str
    build: Callable[[int | None, str], Backbone]
    batch: int
    length: int | None
    dtype: str

    def model(self, layers: int | None = None) -> Backbone:
        """The model, of another depth where one is given."""
        return self.build(layers, self.dtype)

    def params(self, model: Backbone) -> Any:
        """The shapes of its parameters."""
        shapes = jax.eval_shape(model.init, jax.eval_shape(jax.random.key, 0))
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(self.dtype)), shapes)

    def inputs(self, model: Backbone) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes of a batch; a language model predicts every token, other models a class."""
        if self.length is None:
            image = (self.batch, 3, *model.config.image_size)
            inputs = {"pixel_values": jax.ShapeDtypeStruct(image, jnp.dtype(self.dtype))}
        else:
            tokens = jax.ShapeDtypeStruct((self.batch, self.length), jnp.int32)
            inputs = {"input_ids": tokens}
        labels = (self.batch, self.length) if model.head_name == "causal_lm" else (self.batch,)
        return {**inputs, "labels": jax.ShapeDtypeStruct(labels, jnp.int32)}


def _roberta(layers: int | None, dtype: str) -> Backbone:
    values = {**ROBERTA_LARGE, "num_hidden_layers": layers or ROBERTA_LARGE["num_hidden_layers"]}
    return roberta.roberta(roberta.read_config(values), head="classifier", dtype=dtype)


def _vit(layers: int | None, dtype: str) -> Backbone:
    config = dataclasses.replace(VIT_LARGE, num_hidden_layers=layers or VIT_LARGE.num_hidden_layers)
    return vit(config.with_num_labels(CLASSES), head="classifier", dtype=dtype)


def _llama(layers: int | None, dtype: str) -> Backbone:
    values = {**LLAMA_3_8B, "num_hidden_layers": layers or LLAMA_3_8B["num_hidden_layers"]}
    return decoder(llama.read_config(values), head="causal_lm", dtype=dtype)


SUBJECTS = (
    Subject("RoBERTa-large", _roberta, 32, 512, "float32"),
    Subject("ViT-L/16", _vit, 32, None, "float32"),
    Subject("Llama-3-8B", _llama, 8, 2048, "bfloat16"),
)
