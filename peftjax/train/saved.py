"""Trained adapters put to use: evaluated on data, merged into a checkpoint."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax

from peftjax.errors import PeftError
from peftjax.io.adapter import Adapter, load_adapter, read_config, trained_parameters
from peftjax.losses import classification
from peftjax.models.backbone import Backbone, Params
from peftjax.models.load import load, save
from peftjax.models.tokenizer import load_tokenizer
from peftjax.train.data.batches import evaluation_batches, tokenise
from peftjax.train.data.dataset import Split
from peftjax.train.data.files import file_split
from peftjax.train.options import DOCSTRINGS, DataOptions, model_folder, open_data
from peftjax.train.step import make_evaluate

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


@dataclasses.dataclass(frozen=True)
class Tuned:
    """A base model with its adapter."""

    model: Backbone
    params: Params
    adapter: Adapter
    folder: Path  # the base model's


def open_tuned(adapter: Path, model: str | None = None) -> Tuned:
    """The model that an adapter was trained on, and the adapter.

    Args:
        adapter: folder that `run` or `save_adapter` wrote.
        model: the base model's folder, where it has moved since.

    Raises:
        PeftError: the adapter was not made by `run`, or does not fit the model.
    """
    config = read_config(adapter)
    info: dict[str, Any] = config["info"]
    if missing := [name for name in ("model", "head", "labels", "max_length") if name not in info]:
        raise PeftError(f"{adapter}: the adapter does not say its {missing[0]}; it was not made by `train`")
    folder = model_folder(model or info["model"])
    backbone, params = load(
        folder,
        head=info["head"],
        num_labels=len(info["labels"]) or None,
        key=jax.random.key(config["seed"]),
        replaced=trained_parameters(adapter),
    )
    if info["labels"]:
        named = dataclasses.replace(backbone.config, labels=tuple(info["labels"]))
        backbone = dataclasses.replace(backbone, config=named)
    return Tuned(backbone, params, load_adapter(adapter, params), folder)


def evaluate_saved(
    adapter: Path, data: DataOptions, *, model: str | None = None, batch_size: int = 64
) -> dict:
    """Accuracy and loss of a saved adapter on labelled texts.

    Args:
        adapter: its folder.
        data: `data` names the texts to evaluate on: a file as a whole, of other sources the
            evaluation part.
        model: the base model's folder, where it has moved since.
        batch_size: texts at a time.

    Raises:
        PeftError: the data cannot be read, or has a label the classifier does not know.
    """
    names = tuple(read_config(adapter)["info"].get("labels", ()))
    if not names:
        raise PeftError(f"{adapter}: the adapter has no classifier to evaluate")
    split = _evaluation_part(data, names)
    tuned = open_tuned(adapter, model)
    tokenizer = load_tokenizer(tuned.folder)
    texts = tokenise(
        split,
        tokenizer.encode,
        max_length=tuned.adapter.info["max_length"],
        pad_id=tokenizer.pad_id,
    )
    method = tuned.adapter.method
    evaluate = make_evaluate(method.model(tuned.model), method, classification)
    scores = evaluate(tuned.adapter.trainable, tuned.adapter.frozen, evaluation_batches(texts, batch_size))
    return {"adapter": str(adapter), "data": data.data, "texts": len(split), **scores}


def merge_saved(adapter: Path, output: Path, *, model: str | None = None) -> Path:
    """Write the merged model as a Hugging Face folder, tokenizer included; the base stays as it is.

    Raises:
        PeftError: a merged parameter is not finite, or the output is the base model's own folder.
    """
    tuned = open_tuned(adapter, model)
    if output.resolve() == tuned.folder.resolve():
        raise PeftError(f"{output} is the base model's folder; choose another output folder")
    merged = tuned.adapter.method.merge(tuned.adapter.frozen, tuned.adapter.trainable, safe=True)
    save(output, tuned.model, merged)
    for name in _TOKENIZER_FILES:
        if (tuned.folder / name).is_file():
            shutil.copyfile(tuned.folder / name, output / name)
    return output


def _evaluation_part(data: DataOptions, names: tuple[str, ...]) -> Split:
    if data.eval_data is not None:
        raise PeftError("eval takes the texts to evaluate on as data, and no eval_data")
    if data.data == DOCSTRINGS or data.data.startswith("tfds:"):
        dataset = open_data(data)
        if dataset.label_names != names:
            raise PeftError(
                f"{data.data} has other labels than the adapter: {', '.join(dataset.label_names)}"
            )
        return dataset.evaluation
    return file_split(data.data, names, text_column=data.text_column, label_column=data.label_column)
