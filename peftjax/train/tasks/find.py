"""Which task a run is, by its options, its model and its data."""

from collections.abc import Iterable
from dataclasses import fields
from typing import Any, get_args

from peftjax.core.errors import PeftError
from peftjax.core.tree import nearest
from peftjax.models.families import FAMILIES
from peftjax.train.config import Task
from peftjax.train.data.columns import LABEL_GUESSES
from peftjax.train.data.files import DataFile
from peftjax.train.data.language.corpus import PLAIN_TEXT
from peftjax.train.data.language.dataset import LanguageOptions, RowOptions, SourceOptions
from peftjax.train.data.language.open import find_source
from peftjax.train.data.tfds import PREFIX
from peftjax.train.open import LANGUAGE_HEAD, BaseModel
from peftjax.train.options import DOCSTRINGS, DataOptions, RunOptions


def find_task(options: RunOptions, base: BaseModel, file: DataFile) -> Task:
    """The task asked for, or else the one that model and data are for; `file` is that of the data.

    An encoder classifies. A decoder classifies where the data has labels and neither chats nor prompts
    with completions; else it learns to write.

    Raises:
        PeftError: the task does not exist, or not for this model or data; or an option has no use in it.
    """
    task = options.task
    if task is not None and task not in get_args(Task):
        raise PeftError(f"no task is called {task!r}; closest: {nearest(task, get_args(Task))}")
    if task is None:
        task = (_of_decoder if base.is_decoder else _of_encoder)(options.texts, file)
    if task == "classification":
        _refuse(task, _given(options.rows, RowOptions))
    else:
        _require_decoder(base)
        if options.base.head not in (None, LANGUAGE_HEAD):
            raise PeftError(
                f"the task language trains the head '{LANGUAGE_HEAD}', not {options.base.head!r}: leave head "
                "out, or choose the task classification"
            )
    check_data(options.texts, task)
    return task


def check_data(texts: DataOptions, task: Task) -> None:
    """Refuse data that the task cannot use, and options of the data that have no use in it.

    Raises:
        PeftError: names the data or the option.
    """
    if task == "classification":
        _refuse(task, set(_given(texts, SourceOptions)) - {"text_column"})
        return
    _refuse(task, [] if texts.label_column is None else ["label_column"])
    if _is_labeled_set(texts.data):
        raise PeftError(
            f"the data set {texts.data!r} is for the task classification; a language model needs a file of "
            "chats, of prompts with completions, or of text: give it as data"
        )


def language_options(texts: DataOptions, rows: RowOptions) -> LanguageOptions:
    """Both parts in one."""
    parts = ((texts, SourceOptions), (rows, RowOptions))
    return LanguageOptions(**{f.name: getattr(part, f.name) for part, of in parts for f in fields(of)})


def _of_decoder(texts: DataOptions, file: DataFile) -> Task:
    if texts.label_column is not None or _is_labeled_set(texts.data):
        return "classification"
    source = find_source(file, language_options(texts, RowOptions()))
    written = texts.source is not None or source != "corpus"
    return "language" if written or not _guesses_labels(file) else "classification"


def _of_encoder(texts: DataOptions, file: DataFile) -> Task:
    labeled = texts.label_column is not None or _is_labeled_set(texts.data) or _guesses_labels(file)
    if not labeled:
        raise PeftError(
            f"{texts.data} has no label column ({', '.join(map(repr, LABEL_GUESSES))}), which an encoder "
            "needs: name it with label_column, or give a decoder as the model to learn to write the texts"
        )
    return "classification"


def _guesses_labels(file: DataFile) -> bool:
    return file.path.suffix.lower() not in PLAIN_TEXT and bool(set(file.columns) & set(LABEL_GUESSES))


def _is_labeled_set(data: str) -> bool:
    return data == DOCSTRINGS or data.startswith(PREFIX)


def _require_decoder(base: BaseModel) -> None:
    if not base.is_decoder:
        decoders = ", ".join(name for name, family in FAMILIES.items() if LANGUAGE_HEAD in family.heads)
        raise PeftError(
            f"{base.folder} is an encoder and writes no text: give a decoder ({decoders}) as the model, or "
            "choose the task classification"
        )


def _given(options: Any, of: type) -> list[str]:
    """The fields of the dataclass `of` that differ from their default in `options`."""
    return [f.name for f in fields(of) if getattr(options, f.name) != f.default]


def _refuse(task: Task, given: Iterable[str]) -> None:
    other = "language" if task == "classification" else "classification"
    for name in sorted(given):
        raise PeftError(f"the task {task} has no use for {name}: leave it out, or choose the task {other}")
