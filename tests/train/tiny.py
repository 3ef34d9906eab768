"""A tiny model, method and data set for tests of the loop; run as a program, a resumable run."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from peftjax.train.config import TrainConfig, plan_steps
from peftjax.train.data import batches
from peftjax.train.data.dataset import Split
from peftjax.train.loop import fit
from peftjax.transform.frozen import Frozen
from peftjax.transform.transform import Transform

CONFIG = TrainConfig(
    steps=40,
    batch_size=8,
    max_length=32,
    learning_rate=0.05,
    log_every=1,
    eval_every=10,
    save_every=4,
    eval_batch_size=16,
    model_dropout=True,
    best_by="accuracy",
)


def forward(params, batch, *, key=None):
    """Mean embedding of the tokens, dropout of 10 %, linear classifier: logits [B, 3]."""
    mask = batch["attention_mask"][..., None]
    hidden = (params["embed"][batch["input_ids"]] * mask).sum(axis=1) / mask.sum(axis=1)
    if key is not None:
        hidden = jnp.where(jax.random.bernoulli(key, 0.9, hidden.shape), hidden / 0.9, 0.0)
    return hidden @ params["head"]["kernel"] + params["head"]["bias"]


METHOD = Transform(
    "tiny",
    config={},
    init=lambda key, params: parameters(),
    apply=lambda frozen, trainable, key=None: {**frozen.params, **trainable},
)


def base():
    return {"embed": jax.random.normal(jax.random.key(1), (30, 16))}


def parameters():
    return Frozen(base()), {"head": {"kernel": jnp.zeros((16, 3)), "bias": jnp.zeros(3)}}


def data():
    """Texts of letters; the label is the letter's number modulo 3."""
    generator = np.random.default_rng(0)
    letters = generator.integers(0, 26, size=100)
    texts = tuple(chr(97 + i) * int(generator.integers(1, 30)) for i in letters)
    split = Split(texts, tuple(int(i) % 3 for i in letters))

    def encode(texts, max_length):
        return [[ord(letter) - 96 for letter in text][:max_length] for text in texts]

    return batches.tokenize(split, encode, max_length=CONFIG.max_length, pad_id=0)


def run(directory=None, config=CONFIG, **options):
    frozen, trainable = parameters()
    split = data()
    return fit(
        **{
            "forward": forward,
            "method": METHOD,
            "frozen": frozen,
            "trainable": trainable,
            "batches": batches.training_batches(split, config.batch_size, config.seed),
            "held_out": lambda: batches.evaluation_batches(split, config.eval_batch_size),
            "config": config,
            "steps": plan_steps(config, len(split)),
            "key": jax.random.key(config.seed),
            "directory": directory,
            "identity": {"method": "tiny"},
            **options,
        }
    )


if __name__ == "__main__":
    result = run(Path(sys.argv[1]))
    np.save(Path(sys.argv[1]) / "kernel.npy", result.trainable["head"]["kernel"])
