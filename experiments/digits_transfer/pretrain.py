"""The model to adapt: a ViT of the library, trained from scratch on the digits 0-4."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

import peftjax as pj
from experiments.digits_transfer.data import CLASSES, Images, draw, of_classes, training_batches
from experiments.harness.training import finetuning_optimizer, make_programs, train
from peftjax.backbone.backbone import Backbone, Params
from peftjax.models.vit import ViTConfig, vit

KNOWN = CLASSES // 2
"""Classes that the model is trained on; as many are left to adapt it to."""


@dataclasses.dataclass(frozen=True)
class Pretraining:
    """The model to pre-train, and for how long on what."""

    width: int = 128
    """Width of the model; its feed-forward layers are twice as wide."""
    layers: int = 2
    """Blocks, of 4 heads each."""
    steps: int = 600
    """Optimizer steps."""
    batch: int = 64
    """Images a step."""
    rate: float = 1e-3
    """Peak learning rate."""
    held_out: int = 30
    """Images of each class to test on."""


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """The model, and how good it is at what it was trained on."""

    model: Backbone
    params: Params
    accuracy: float
    """On the held-out images of the digits 0-4."""


def build_model(options: Pretraining) -> Backbone:
    """A ViT on patches of 2 x 2 pixels: 16 of them and the class token, which the classifier reads."""
    config = ViTConfig(
        hidden_size=options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=4,
        intermediate_size=2 * options.width,
        image_size=(8, 8),
        patch_size=(2, 2),
        num_channels=1,
    )
    return vit(config.with_num_labels(KNOWN), head="classifier")


def pretrain(images: Images, options: Pretraining, seed: int = 0) -> Pretrained:
    """Train all parameters on the digits 0-4."""
    model = build_model(options)
    known = of_classes(images, 0, KNOWN)
    test, rest = draw(known, options.held_out, np.random.default_rng(seed))
    method = pj.full()
    programs = make_programs(model, method, finetuning_optimizer(options.steps))
    start = programs.start(method, model.init(jax.random.key(seed)), options.rate, seed)
    trained = train(programs, start, training_batches(rest, options.batch, seed), options.steps)
    scores = programs.evaluate(trained.state, [test.batch()])
    return Pretrained(model, method.merge(trained.state.frozen, trained.state.trainable), scores["accuracy"])
