"""What the methods are compared on: a base, what it is adapted to, and what it could do before."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np

from experiments.digits_transfer import data as digits
from experiments.digits_transfer.pretrain import KNOWN, Pretraining, build_model, pretrain
from experiments.digits_transfer.transfer import Transfer, make_tasks
from experiments.glue_sst2.run import Texts, open_minilm, split_texts
from experiments.harness.memory import Model
from experiments.pretrain_bytes import data as texts
from experiments.quantized_loss.run import Options as Base
from experiments.quantized_loss.run import trained_base
from peftjax.backbone.backbone import Backbone, Params
from peftjax.losses import Batch
from peftjax.train.data.batches import evaluation_batches, training_batches
from peftjax.train.data.dataset import TextDataset
from peftjax.train.data.docstrings import docstring_dataset
from peftjax.train.data.files import file_dataset

Batches = Callable[[], Iterable[Batch]]


@dataclasses.dataclass(frozen=True)
class Before:
    """What forgetting is measured by.

    Attributes:
        batches: of the kind that the base was trained on.
        classifier: what it answered them with; None of a model that has kept its head.
    """

    batches: Batches
    classifier: Callable[[], Params] | None = None


@dataclasses.dataclass(frozen=True)
class Task:
    """One task. Nothing is read, drawn or trained before it is asked for.

    Attributes:
        about: what is adapted to what, in a sentence.
        rank: of the LoRA whose size the others take.
        steps: of a run.
        shapes: the model and a step's batch, from shapes alone.
        width: of the model.
        open: a seed's model, and its parameters with the head that is trained.
        batches: a seed's, endless.
        held_out: to choose the learning rate by.
        test: to score on.
        score: what is scored.
        before: None where the base has no loss of its own.
        rates: peak learning rates to try first.
        wider: how often they are extended, at most.
    """

    about: str
    rank: int
    steps: int
    shapes: Model
    width: int
    open: Callable[[int], tuple[Backbone, Params]]
    batches: Callable[[int], Iterator[Batch]]
    held_out: Batches
    test: Batches
    score: Literal["accuracy", "loss"] = "accuracy"
    before: Before | None = None
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    wider: int = 2


def digits_task(
    seeds: int = 3,
    base: Pretraining | None = None,
    transfer: Transfer | None = None,
    images: Callable[[], digits.Images] = digits.load_images,
) -> Task:
    """The ViT of `digits_transfer`, from the digits 0-4 to 5-9."""
    base = base or Pretraining()
    transfer = dataclasses.replace(transfer or Transfer(), seeds=seeds)

    @cache
    def made() -> tuple:
        whole = images()
        pretrained = pretrain(whole, base)
        return pretrained, *make_tasks(whole, pretrained, transfer)

    def known() -> list[Batch]:
        """The images that pre-training held out."""
        of_known = digits.of_classes(images(), 0, KNOWN)
        return [digits.draw(of_known, base.held_out, np.random.default_rng(0))[0].batch()]

    return Task(
        f"A ViT (width {base.width}, {base.layers} blocks) pre-trained on the digits 0-4, adapted to 5-9 "
        f"with {transfer.shots} images of each: {transfer.steps} steps of {transfer.batch}. Forgetting is "
        "the cross-entropy of held-out digits 0-4 under the classifier of pre-training, after minus before.",
        rank=4,
        steps=transfer.steps,
        shapes=Model("digits", lambda layers, dtype: build_model(base), transfer.batch, None, "float32"),
        width=base.width,
        open=lambda seed: (made()[0].model, made()[1][seed].params),
        batches=lambda seed: digits.training_batches(made()[1][seed].train, transfer.batch, seed),
        held_out=lambda: [made()[1][0].validation.batch()],
        test=lambda: [made()[2].batch()],
        before=Before(known, lambda: made()[0].params["head"]["classifier"]),
    )


def text_task(
    about: str, read: Callable[[], TextDataset], labels: int, *, held_out: int, length: int, steps: int = 100
) -> Task:
    """MiniLM on texts of some classes, 32 a step."""
    batch = 32

    @cache
    def parts() -> Texts:
        return split_texts(read(), held_out, length)

    return Task(
        f"MiniLM on {about}: {steps} steps of {batch} texts of at most {length} tokens. There is no "
        "forgetting to measure: the base gives vectors, and has no loss of its own.",
        rank=8,
        steps=steps,
        shapes=Model(
            "MiniLM",
            lambda layers, dtype: open_minilm(0, labels=labels)[0],
            batch,
            length,
            "float32",
        ),
        width=384,
        open=lambda seed: open_minilm(seed, labels=labels),
        batches=lambda seed: training_batches(parts().train, batch, seed),
        held_out=lambda: evaluation_batches(parts().held_out, 64),
        test=lambda: evaluation_batches(parts().test, 64),
    )


def sst2_task(folder: Path) -> Task:
    """SST-2."""
    return text_task(
        "SST-2",
        lambda: file_dataset(str(folder / "train.tsv"), str(folder / "dev.tsv")),
        2,
        held_out=1000,
        length=32,
    )


def docstrings_task() -> Task:
    """Docstrings of Python's standard library, by their package: 16 classes, and no download."""
    about = "docstrings of Python's standard library, masked, by 16 packages"
    return text_task(about, docstring_dataset, 16, held_out=500, length=64)


def wikitext2_task(wikitext2: Path, shakespeare: Path, base: Base | None = None) -> Task:
    """The small Llama over bytes, from Tiny Shakespeare to WikiText-2."""
    base = base or Base(shakespeare)
    steps, length, batch = base.adapter_steps, base.length, base.batch

    @cache
    def text(folder: Path) -> texts.Text:
        return texts.read_text(folder)

    @cache
    def params() -> Params:
        return trained_base(base, text(shakespeare))

    def some(part: np.ndarray) -> list[Batch]:
        return texts.first_batches(part, length, batch, base.tested)

    def build(layers: int | None, dtype: str) -> Backbone:
        return texts.small_llama(base.width, base.layers, length)

    return Task(
        f"A Llama over bytes (width {base.width}, {base.layers} blocks) trained on Tiny Shakespeare for "
        f"{base.steps} steps, adapted to WikiText-2: {steps} steps of {batch} x {length}. Forgetting is the "
        "loss on Tiny Shakespeare's test part, after minus before, in nats a byte.",
        rank=base.rank,
        steps=steps,
        shapes=Model("Llama", build, batch, length, "float32"),
        width=base.width,
        open=lambda seed: (build(None, "float32"), params()),
        batches=lambda seed: texts.training_batches(text(wikitext2).train, length, batch, 1 + seed),
        held_out=lambda: some(text(wikitext2).held_out),
        test=lambda: some(text(wikitext2).test),
        score="loss",
        before=Before(lambda: some(text(shakespeare).test)),
    )
