"""A whole fine-tuning run: data, model, method, training, comparison, adapter and summary."""

import dataclasses
import hashlib
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from peftjax import tree
from peftjax.io.adapter import save_adapter
from peftjax.io.files import replacing
from peftjax.losses import classification
from peftjax.methods import describe
from peftjax.models.backbone import Backbone, Params
from peftjax.models.load import FAMILIES
from peftjax.models.tokenizer import load_tokenizer
from peftjax.train.config import TrainConfig, plan_steps, validate
from peftjax.train.data.batches import TokenisedSplit, evaluation_batches, sample, tokenise, training_batches
from peftjax.train.data.dataset import TextDataset
from peftjax.train.identity import run_identity
from peftjax.train.loop import fit
from peftjax.train.metrics import FILE as METRICS
from peftjax.train.options import (
    RunOptions,
    make_method,
    model_folder,
    open_data,
    open_model,
    start_at_probe,
    with_new_head,
)
from peftjax.train.probe import ProbeResult, linear_probe, majority_accuracy
from peftjax.train.step import make_evaluate
from peftjax.train.usage import peak_memory

ADAPTER = "adapter"
SUMMARY = "summary.json"
PROBE_TEXTS = 10_000
"""Training texts that the linear probe is fitted on at most, so that it stays short."""
# Options that change what is written or kept, and not the numbers of the run.
_NOT_IDENTITY = ("log_every", "keep_last", "keep_best", "save_every", "tensorboard")

Summary = dict[str, Any]


def run(options: RunOptions, say: Callable[[str], None] = lambda text: None) -> Summary:
    """Fine-tune, and leave the adapter and a summary in the output folder.

    Args:
        options: what to train on what.
        say: called with a line about each stage.

    Returns:
        The contents of `summary.json`: accuracies of the method, of the linear probe and of the
        majority class on the evaluation texts, counts of parameters, peak bytes of the process, and
        real tokens (no padding) per second of training.

    Raises:
        PeftError: an option, a file or the data cannot be used; earlier outputs stay as they were.
    """
    started = time.perf_counter()
    config = options.training
    validate(config)
    method = make_method(options.tuning)
    data = open_data(options.source)
    say(f"{data.name}: {len(data.train)} texts to train on, {len(data.evaluation)} to evaluate on, "
        f"{len(data.label_names)} labels")  # fmt: skip
    train_split, eval_split = _tokenised(options, data, config.max_length)
    model, params = open_model(
        options.base, len(data.label_names), dtype=config.dtype, remat=config.remat, seed=config.seed
    )
    method = with_new_head(method, model, params)
    probe = _probe(model, params, train_split, eval_split, config, say) if options.probe else None
    if probe is not None:
        params = start_at_probe(method, model, params, probe.weights)
    frozen, trainable = method.init(jax.random.key(config.seed), params)
    say(f"{method.name}: {tree.count(trainable):,} of {tree.count(params):,} parameters are trained")

    forward = method.model(model)
    result = fit(
        forward,
        method,
        frozen,
        trainable,
        training_batches(train_split, config.batch_size, config.seed),
        lambda: evaluation_batches(eval_split, config.eval_batch_size),
        config=config,
        steps=plan_steps(config, len(train_split)),
        key=jax.random.key(config.seed),
        directory=options.output,
        identity={**run_identity(describe(method), params), **_data_and_training(data, config)},
    )
    evaluate = make_evaluate(forward, method, classification)
    scores = evaluate(result.trainable, frozen, evaluation_batches(eval_split, config.eval_batch_size))

    info = {
        "model": options.base.model,
        "head": model.head_name,
        "labels": list(data.label_names),
        "max_length": config.max_length,
    }
    adapter = options.output / ADAPTER
    save_adapter(adapter, method, frozen, result.trainable, seed=config.seed, info=info)
    summary: Summary = {
        "data": data.name,
        "model": options.base.model,
        "method": describe(method),
        "accuracy": scores["accuracy"],
        "loss": scores["loss"],
        "probe_accuracy": None if probe is None else probe.accuracy,
        "majority_accuracy": majority_accuracy(train_split.labels, eval_split.labels),
        "trainable_parameters": tree.count(trainable),
        "total_parameters": tree.count(params),
        **peak_memory(),
        "tokens_per_second": _tokens_per_second(options.output / METRICS),
        "steps": result.step,
        "best_step": result.best.step,
        "train_texts": len(data.train),
        "eval_texts": len(data.evaluation),
        "labels": len(data.label_names),
        "seconds": time.perf_counter() - started,
        "adapter": str(adapter),
    }
    with replacing(options.output / SUMMARY) as (file,):
        file.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


def _tokenised(
    options: RunOptions, data: TextDataset, max_length: int
) -> tuple[TokenisedSplit, TokenisedSplit]:
    tokenizer = load_tokenizer(model_folder(options.base.model))
    train, held_out = (
        tokenise(split, tokenizer.encode, max_length=max_length, pad_id=tokenizer.pad_id)
        for split in (data.train, data.evaluation)
    )
    return train, held_out


def _probe(
    model: Backbone,
    params: Params,
    train: TokenisedSplit,
    held_out: TokenisedSplit,
    config: TrainConfig,
    say: Callable[[str], None],
) -> ProbeResult:
    """A linear classifier on the frozen model's mean-pooled features, of `PROBE_TEXTS` at most."""
    train = sample(train, PROBE_TEXTS, config.seed)
    encoder = FAMILIES[model.config.model_type].build(model.config, head="mean", dtype=model.dtype)
    encode = jax.jit(lambda params, batch: encoder(params, batch))
    body = {"embed": params["embed"], "blocks": params["blocks"], "head": {}}

    def features(split: TokenisedSplit) -> tuple[np.ndarray, np.ndarray]:
        batches = evaluation_batches(split, config.eval_batch_size)
        pairs = [(np.asarray(encode(body, b), np.float32)[b["weights"] > 0], b["labels"]) for b in batches]
        found, labels = (np.concatenate(parts) for parts in zip(*pairs))
        return found, labels[: len(found)]  # only the last batch has rows to fill it up

    result = linear_probe(
        *features(train), *features(held_out), classes=len(model.config.labels), seed=config.seed
    )
    say(f"linear probe on the frozen features: accuracy {result.accuracy:.4f}")
    return result


def _data_and_training(data: TextDataset, config: TrainConfig) -> dict[str, Any]:
    """What decides a run's numbers beside method and model."""
    texts = hashlib.sha256()
    for split in (data.train, data.evaluation):
        for text, label in zip(split.texts, split.labels):
            texts.update(f"{label} {len(text)} {text}".encode())
    training = dataclasses.asdict(config)
    for name in _NOT_IDENTITY:
        del training[name]
    return {"data": {"name": data.name, "sha256": texts.hexdigest()}, "training": training}


def _tokens_per_second(metrics: Path) -> float | None:
    """The median rate over the lines of the metrics file."""
    lines = (json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines())
    rates = [rate for line in lines if (rate := line.get("tokens_per_second"))]
    return statistics.median(rates) if rates else None
