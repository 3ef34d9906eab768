"""Classification of labeled texts, beside a linear probe and the majority class."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from peftjax.backbone.backbone import Backbone, Params
from peftjax.core.errors import PeftError
from peftjax.losses import Batch
from peftjax.models.families import FAMILIES
from peftjax.parallel.processes import gathered
from peftjax.train.adapter_info import Info
from peftjax.train.config import TrainConfig
from peftjax.train.data.batches import TokenizedSplit, evaluation_batches, sample, tokenize, training_batches
from peftjax.train.data.dataset import Split, TextDataset
from peftjax.train.data.files import DataFile, file_split
from peftjax.train.data.tfds import PREFIX
from peftjax.train.new_head import start_at_probe
from peftjax.train.open import BaseModel, open_data, open_tokenizer
from peftjax.train.options import DOCSTRINGS, DataOptions, RunOptions
from peftjax.train.probe import ProbeResult, linear_probe, majority_accuracy
from peftjax.train.tasks.task import Run, Say, TaskData, TaskSteps
from peftjax.transform.transform import Transform

PROBE_TEXTS = 10_000
"""Training texts that the linear probe is fitted on at most, so that it stays short."""


def read(options: RunOptions, base: BaseModel, config: TrainConfig, file: DataFile, say: Say) -> TaskData:
    """The labeled texts of a run as tokens.

    Raises:
        PeftError: the data cannot be read, or the tokenizer does not fit them.
    """
    data = open_data(options.texts, file)
    say(f"{data.name}: {len(data.train)} texts to train on, {len(data.evaluation)} to evaluate on, "
        f"{len(data.label_names)} labels")  # fmt: skip
    train, held_out = _tokenized((data.train, data.evaluation), base, config.max_length)
    return TaskData(
        train,
        held_out,
        training=training_batches(train, config.batch_size, config.seed),
        held_out=lambda: evaluation_batches(held_out, config.eval_batch_size),
        num_labels=len(data.label_names),
        identity={"name": data.name, "sha256": _digest(data)},
        info={"labels": list(data.label_names)},
        summary={
            "majority_accuracy": majority_accuracy(train.labels, held_out.labels),
            "train_texts": len(data.train),
            "eval_texts": len(data.evaluation),
            "labels": len(data.label_names),
        },
    )


def start(
    run: Run, model: Backbone, params: Params, method: Transform, say: Say
) -> tuple[Params, Mapping[str, Any]]:
    """A new head starts from the linear probe, where one is asked for."""
    if not run.options.probe:
        return params, {"probe_accuracy": None}
    probe = _probe(model, params, run.data.train, run.data.evaluation, run.config, say)
    return start_at_probe(method, model, params, probe.weights), {"probe_accuracy": probe.accuracy}


def saved_batches(
    info: Info, texts: DataOptions, base: BaseModel, batch_size: int
) -> tuple[Iterable[Batch], dict[str, Any]]:
    """The batches to evaluate a saved adapter on, and what to report of them.

    Raises:
        PeftError: the data cannot be read, or has a label the classifier does not know.
    """
    split = _evaluation_part(texts, tuple(info.labels))
    (tokenized,) = _tokenized((split,), base, info.max_length)
    return evaluation_batches(tokenized, batch_size), {"texts": len(split)}


def named_scores(scores: Mapping[str, float]) -> dict[str, float]:
    """The scores as they are reported."""
    return {"accuracy": scores["accuracy"], "loss": scores["loss"]}


CLASSIFICATION = TaskSteps(read, start, saved_batches, named_scores, evaluates_before=False)


def _tokenized(splits: Sequence[Split], base: BaseModel, max_length: int) -> list[TokenizedSplit]:
    tokenizer = open_tokenizer(base)
    pad_id = _pad_id(base, tokenizer.pad_id)
    return [tokenize(split, tokenizer.encode, max_length=max_length, pad_id=pad_id) for split in splits]


def _pad_id(base: BaseModel, of_tokenizer: int) -> int:
    """What fills a batch up: a decoder's classifier finds the last token by its model's padding token."""
    if not base.is_decoder:
        return of_tokenizer
    of_model = base.family.read_config(base.config).pad_token_id
    return of_tokenizer if of_model is None else of_model


def _evaluation_part(texts: DataOptions, names: tuple[str, ...]) -> Split:
    if texts.data == DOCSTRINGS or texts.data.startswith(PREFIX):
        dataset = open_data(texts)
        if dataset.label_names != names:
            raise PeftError(
                f"{texts.data} has other labels than the adapter: {', '.join(dataset.label_names)}"
            )
        return dataset.evaluation
    return file_split(texts.data, names, text_column=texts.text_column, label_column=texts.label_column)


def _probe(
    model: Backbone,
    params: Params,
    train: TokenizedSplit,
    held_out: TokenizedSplit,
    config: TrainConfig,
    say: Say,
) -> ProbeResult:
    """A linear classifier on the frozen model's mean-pooled features, of `PROBE_TEXTS` at most."""
    train = sample(train, PROBE_TEXTS, config.seed)
    encoder = FAMILIES[model.config.model_type].build(model.config, head="mean", dtype=model.dtype)
    encode = jax.jit(lambda params, batch: encoder(params, batch))
    of_head = jax.eval_shape(encoder.init, jax.random.key(0))["head"]
    body = {**params, "head": {name: params["head"][name] for name in of_head}}

    def features(split: TokenizedSplit) -> tuple[np.ndarray, np.ndarray]:
        batches = evaluation_batches(split, config.eval_batch_size)
        encoded = ((gathered(encode(body, batch)), batch) for batch in batches)
        pairs = [(np.asarray(rows, np.float32)[b["weights"] > 0], b["labels"]) for rows, b in encoded]
        found, labels = (np.concatenate(parts) for parts in zip(*pairs))
        return found, labels[: len(found)]  # only the last batch has rows to fill it up

    result = linear_probe(
        *features(train), *features(held_out), classes=len(model.config.labels), seed=config.seed
    )
    say(f"linear probe on the frozen features: accuracy {result.accuracy:.4f}")
    return result


def _digest(data: TextDataset) -> str:
    texts = hashlib.sha256()
    for split in (data.train, data.evaluation):
        for text, label in zip(split.texts, split.labels):
            texts.update(f"{label} {len(text)} {text}".encode())
    return texts.hexdigest()
