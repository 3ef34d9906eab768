"""Learning to write: the next token of chats, of completions or of running text, by a decoder."""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from peftjax.losses import Batch
from peftjax.models.vocabulary import require_ids
from peftjax.train.config import TrainConfig
from peftjax.train.data.language.batches import evaluation_batches, training_batches
from peftjax.train.data.language.dataset import LanguageDataset
from peftjax.train.data.language.open import open_language_data, open_language_rows
from peftjax.train.data.language.rows import TokenRows
from peftjax.train.data.language.truncation import Cut
from peftjax.train.info import Info
from peftjax.train.options import DataOptions, RunOptions, model_folder, open_model, open_tokenizer
from peftjax.train.tasks.find import language_options
from peftjax.train.tasks.prepared import Prepared
from peftjax.transform.transform import Transform


def prepare(
    options: RunOptions,
    config: TrainConfig,
    method_for: Callable[[int], Transform],
    say: Callable[[str], None],
) -> Prepared:
    """Data and model of a run.

    Raises:
        PeftError: the data, the model or an option cannot be used.
    """
    data = open_language_data(
        options.texts.data,
        open_tokenizer(model_folder(options.base.model)),
        max_length=config.max_length,
        eval_data=options.texts.eval_data,
        options=language_options(options.texts, options.rows),
    )
    parts = ((data.train, data.train_cut, "train on"), (data.evaluation, data.evaluation_cut, "evaluate on"))
    for rows, cut, purpose in parts:
        say(f"{data.name} ({data.source}): {_described(rows, cut)} to {purpose}")
    model, params = open_model(options.base, None, dtype=config.dtype, remat=config.remat, seed=config.seed)
    for rows in (data.train, data.evaluation):
        require_ids(
            rows.ids, model.config.vocab_size, name=f"the text by the tokenizer of {options.base.model}"
        )
    return Prepared(
        model,
        params,
        method_for(len(data.train)),
        examples=len(data.train),
        training=training_batches(data.train, config.batch_size, config.seed),
        held_out=lambda: evaluation_batches(data.evaluation, config.eval_batch_size),
        data={"name": data.name, "sha256": _digest(data)},
        info={"labels": [], "source": data.source, "rows": dataclasses.asdict(options.rows)},
        evaluates_before=True,
        summary={
            "source": data.source,
            **_counts(data.train, data.train_cut, "train_"),
            **_counts(data.evaluation, data.evaluation_cut, "eval_"),
        },
    )


def saved_batches(
    info: Info, texts: DataOptions, folder: Path, batch_size: int
) -> tuple[Iterable[Batch], dict[str, Any]]:
    """The batches to evaluate a saved adapter on, made as in training, and what to report of them.

    Raises:
        PeftError: the data cannot be read or used.
    """
    rows, cut = open_language_rows(
        texts.data,
        open_tokenizer(folder),
        max_length=info.max_length,
        options=language_options(texts, info.rows),
    )
    return evaluation_batches(rows, batch_size), _counts(rows, cut)


def named_scores(scores: Mapping[str, float]) -> dict[str, float]:
    """The scores as they are reported: means per counted token, and the perplexity exp(loss)."""
    loss = scores["loss"]
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return {"loss": loss, "perplexity": perplexity, "token_accuracy": scores["accuracy"]}


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
