"""Trained adapters from files: evaluated on data, or merged into a checkpoint."""

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from peftjax.adapters.files import Adapter, load_adapter, read_config, trained_parameters
from peftjax.backbone.backbone import Backbone, Params
from peftjax.core import tree
from peftjax.core.errors import PeftError
from peftjax.io.files import replacing
from peftjax.losses import classification
from peftjax.models.load import load, stored_dtypes
from peftjax.models.save import save
from peftjax.parallel.mesh import find_mesh
from peftjax.train.adapter_info import Info, read_info
from peftjax.train.config import Task, require_numbers
from peftjax.train.evaluate import make_evaluate
from peftjax.train.open import LANGUAGE_HEAD, BaseModel, find_base
from peftjax.train.options import DataOptions
from peftjax.train.tasks import TASKS
from peftjax.train.tasks.find import check_data

_BESIDE_THE_WEIGHTS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)


@dataclasses.dataclass(frozen=True)
class Tuned:
    """A base model with its adapter."""

    model: Backbone
    params: Params
    adapter: Adapter
    folder: Path  # the base model's
    untied: bool = False  # whether its tied output layer was given a parameter of its own


def open_tuned(
    adapter: Path, model: str | None = None, *, untie: bool = False, mesh: str | None = None
) -> Tuned:
    """The model that an adapter was trained on, and the adapter.

    Args:
        adapter: folder that `run` or `save_adapter` wrote.
        model: the base model's folder, where it has moved since.
        untie: as of `load`, where the adapter does not say it.
        mesh: all devices by axis, or "all" for fsdp; by default one device.

    Raises:
        PeftError: the adapter was not made by `run`, or does not fit the model; the mesh is not of
            the devices.
    """
    info = read_info(adapter)
    return _opened(adapter, info, find_base(model or info.model), untie, mesh)


def _opened(adapter: Path, info: Info, base: BaseModel, untie: bool, mesh: str | None) -> Tuned:
    untie = untie or info.untied
    backbone, params = load(
        base.folder,
        head=info.head,
        num_labels=len(info.labels) or None,
        vocab_size=info.vocab_size,
        redraw_head=True,  # as the training did, else there would be no adapter
        untie=untie,
        key=jax.random.key(read_config(adapter)["seed"]),
        replaced=trained_parameters(adapter),
        described=(base.family, base.config),
        mesh=find_mesh(mesh),
    )
    if info.labels:
        named = dataclasses.replace(backbone.config, labels=tuple(info.labels))
        backbone = dataclasses.replace(backbone, config=named)
    return Tuned(backbone, params, load_adapter(adapter, params), base.folder, untie)


def evaluate_saved(
    adapter: Path,
    data: DataOptions,
    *,
    model: str | None = None,
    batch_size: int = 64,
    untie: bool = False,
    mesh: str | None = None,
) -> dict:
    """The scores of a saved adapter, on texts prepared as in its training.

    Args:
        adapter: its folder.
        data: `data` names the texts to evaluate on: a file as a whole, of other sources the
            evaluation part.
        model: the base model's folder, where it has moved since.
        batch_size: texts at a time.
        untie: as of `open_tuned`.
        mesh: as of `open_tuned`.

    Raises:
        PeftError: the data cannot be read, is not for the adapter's task, or has a label the classifier
            does not know; a batch size that cannot be.
    """
    if data.eval_data is not None:
        raise PeftError("eval takes the texts to evaluate on as data, and no eval_data")
    require_numbers({"batch_size": batch_size})
    info = read_info(adapter)
    task = _task(info)
    check_data(data, task)
    base = find_base(model or info.model)
    batches, counts = TASKS[task].saved_batches(info, data, base, batch_size)
    tuned = _opened(adapter, info, base, untie, mesh)
    method = tuned.adapter.method
    evaluate = make_evaluate(method.model(tuned.model), method, classification)
    scores = evaluate(tuned.adapter.trainable, tuned.adapter.frozen, batches)
    return {"adapter": str(adapter), "data": data.data, **counts, **TASKS[task].named_scores(scores)}


def merge_saved(
    adapter: Path,
    output: Path,
    *,
    model: str | None = None,
    untie: bool = False,
    mesh: str | None = None,
) -> Path:
    """Write the merged model as a Hugging Face folder, tokenizer included; the base stays as it is.

    Each parameter is merged in float32 and written in the dtype that the base's file has, rounded once; what
    the base lacks has the dtype that all others share, or float32. The others are those of `open_tuned`.

    Raises:
        PeftError: a merged parameter is not finite, or too large for the base's dtype; the output is the
            base model's own folder.
    """
    tuned = open_tuned(adapter, model, untie=untie, mesh=mesh)
    if output.resolve() == tuned.folder.resolve():
        raise PeftError(f"{output} is the base model's folder; choose another output folder")
    merged = tuned.adapter.method.merge(tuned.adapter.frozen, tuned.adapter.trainable, safe=True)
    save(output, tuned.model, _rounded(merged, stored_dtypes(tuned.folder, tuned.model, untie=tuned.untied)))
    for name in _BESIDE_THE_WEIGHTS:
        if (tuned.folder / name).is_file():
            with replacing(output / name) as (temporary,):
                shutil.copyfile(tuned.folder / name, temporary)
    return output


def _rounded(params: Params, dtypes: Mapping[str, np.dtype]) -> Params:
    common = set(dtypes.values())
    other = common.pop() if len(common) == 1 else np.dtype(np.float32)

    def rounded(path: str, leaf: jax.Array) -> np.ndarray:
        dtype = dtypes.get(path, other)
        with np.errstate(over="ignore"):  # named below
            array = np.asarray(leaf).astype(dtype)
        if not np.isfinite(array.astype(np.float32)).all():
            raise PeftError(f"merge: parameter {path!r} has values that are too large for the base's {dtype}")
        return array

    return tree.map_named(rounded, params)


def _task(info: Info) -> Task:
    """What the adapter was trained for; one that came from elsewhere says it by its head."""
    return info.task or ("language" if info.head == LANGUAGE_HEAD else "classification")
