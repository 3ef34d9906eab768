"""Learning to write: the next token of chats, of completions or of running text, by a decoder."""

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from peftjax.backbone.backbone import Backbone, Params
from peftjax.losses import Batch
from peftjax.train.adapter_info import Info
from peftjax.train.config import TrainConfig
from peftjax.train.data.files import DataFile
from peftjax.train.data.language.batches import evaluation_batches, training_batches
from peftjax.train.data.language.dataset import LanguageDataset
from peftjax.train.data.language.open import open_language_data, open_language_rows
from peftjax.train.data.language.rows import TokenRows
from peftjax.train.data.language.truncation import Cut
from peftjax.train.open import BaseModel, open_tokenizer
from peftjax.train.options import DataOptions, RunOptions
from peftjax.train.tasks.find import language_options
from peftjax.train.tasks.task import Run, Say, TaskData, TaskSteps
from peftjax.transform.transform import Transform


def read(options: RunOptions, base: BaseModel, config: TrainConfig, file: DataFile, say: Say) -> TaskData:
    """The texts of a run as rows of tokens.

    Raises:
        PeftError: the data or an option cannot be used.
    """
    data = open_language_data(
        file,
        open_tokenizer(base),
        max_length=config.max_length,
        eval_data=options.texts.eval_data,
        options=language_options(options.texts, options.rows),
    )
    parts = ((data.train, data.train_cut, "train on"), (data.evaluation, data.evaluation_cut, "evaluate on"))
    for rows, cut, purpose in parts:
        say(f"{data.name} ({data.source}): {_described(rows, cut)} to {purpose}")
    return TaskData(
        data.train,
        data.evaluation,
        training=training_batches(data.train, config.batch_size, config.seed),
        held_out=lambda: evaluation_batches(data.evaluation, config.eval_batch_size),
        num_labels=None,
        identity={"name": data.name, "sha256": _digest(data)},
        info={"labels": [], "source": data.source, "rows": dataclasses.asdict(options.rows)},
        summary={
            "source": data.source,
            **_counts(data.train, data.train_cut, "train_"),
            **_counts(data.evaluation, data.evaluation_cut, "eval_"),
        },
    )


def start(
    run: Run, model: Backbone, params: Params, method: Transform, say: Say
) -> tuple[Params, Mapping[str, Any]]:
    """The parameters as they were loaded."""
    return params, {}


def saved_batches(
    info: Info, texts: DataOptions, base: BaseModel, batch_size: int
) -> tuple[Iterable[Batch], dict[str, Any]]:
    """The batches to evaluate a saved adapter on, made as in training, and what to report of them.

    Raises:
        PeftError: the data cannot be read or used.
    """
    rows, cut = open_language_rows(
        texts.data,
        open_tokenizer(base),
        max_length=info.max_length,
        options=language_options(texts, info.rows),
    )
    return evaluation_batches(rows, batch_size), _counts(rows, cut)


def named_scores(scores: Mapping[str, float]) -> dict[str, float]:
    """The scores as they are reported: means per counted token, and the perplexity exp(loss)."""
    loss = scores["loss"]
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return {"loss": loss, "perplexity": perplexity, "token_accuracy": scores["accuracy"]}


LANGUAGE = TaskSteps(read, start, saved_batches, named_scores, evaluates_before=True)


def _counts(rows: TokenRows, cut: Cut, part: str = "") -> dict[str, Any]:
    return {
        f"{part}rows": len(rows),
        f"{part}tokens": rows.tokens,
        f"{part}counted_tokens": rows.counted_tokens,
        f"{part}efficiency": rows.efficiency,
        f"{part}cut": dataclasses.asdict(cut),
    }


def _described(rows: TokenRows, cut: Cut) -> str:
    return (
        f"{len(rows):,} rows of {rows.tokens:,} tokens ({rows.counted_tokens:,} count, "
        f"{rows.efficiency:.0%} of the slots are filled, {cut})"
    )


def _digest(data: LanguageDataset) -> str:
    numbers = hashlib.sha256()
    for rows in (data.train, data.evaluation):
        for array in (rows.ids, rows.counts, rows.segments, rows.starts):
            numbers.update(f"{array.dtype} {array.shape}".encode())
            numbers.update(np.ascontiguousarray(array).tobytes())
    return numbers.hexdigest()
