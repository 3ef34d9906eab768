"""What to fine-tune, on what and how: the options of a run, shared by the library and the commands."""

import inspect
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from peftjax.backbone.backbone import Backbone, Params
from peftjax.core import tree
from peftjax.core.errors import PeftError
from peftjax.methods.selection.plain import unfreeze
from peftjax.models.load import FAMILIES, load, read_family
from peftjax.models.minilm import minilm_path
from peftjax.text.tokenizer import Tokenizer, load_tokenizer
from peftjax.train.config import Task, TrainConfig
from peftjax.train.data.dataset import TextDataset
from peftjax.train.data.docstrings import docstring_dataset
from peftjax.train.data.files import file_dataset
from peftjax.train.data.language.corpus import PLAIN_TEXT
from peftjax.train.data.language.dataset import RowOptions, SourceOptions
from peftjax.train.data.tfds import PREFIX, tfds_dataset
from peftjax.train.options_file import parse_yaml
from peftjax.transform.chain import chain
from peftjax.transform.registry import METHODS, build, find_method
from peftjax.transform.transform import Transform

MINILM = "minilm"
DOCSTRINGS = "docstrings"
LANGUAGE_HEAD = "causal_lm"
"""The head of a decoder that scores the next token."""
_REGEX_CHARACTERS = re.compile(r"[.*+?\[\](){}|\\^$]")


@dataclass(frozen=True)
class DataOptions(SourceOptions):
    """Texts to train and evaluate on: labeled ones, or what a language model is to write."""

    data: str = DOCSTRINGS
    """A .jsonl, .csv, .tsv or .parquet file, 'tfds:NAME', or 'docstrings': those of this Python's
    standard library, labeled with their package. For a language model a file of chats, of prompts with
    completions, or of running text, which can also be plain (.txt)."""
    eval_data: str | None = None
    """A file to evaluate on; without one, a tenth of the training file is held out."""
    label_column: str | None = None
    """The column with the label; guessed from the usual names."""


@dataclass(frozen=True)
class ModelOptions:
    """The pre-trained model."""

    model: str = MINILM
    """A Hugging Face folder, or 'minilm': all-MiniLM-L6-v2 from its Python package."""
    head: str | None = None
    """The model's head; by default 'causal_lm' for the task language, and for classification
    'mean_classifier' for sentence encoders, else 'classifier'."""
    vocab_size: int | None = None
    """Resize the vocabulary to so many tokens, for a tokenizer that has more than the model; new rows of the
    word table are the mean of the others."""
    redraw_head: bool = False
    """Draw layers of the task head anew that have another size in the checkpoint, such as a classifier of
    other labels."""
    untie: bool = False
    """Give an output layer that is tied to the word table a parameter of its own, a copy of the table, so
    that the two are trained apart."""


@dataclass(frozen=True)
class MethodOptions:
    """The fine-tuning method; options that are not given keep the method's defaults."""

    method: str = "lora"
    """A method's name, or several joined by '+', the first innermost; `peftjax methods` lists them. An
    option goes to those that have it."""
    rank: int | None = None
    """Rank of the trained factors."""
    alpha: float | None = None
    """Numerator of the scale alpha / rank."""
    targets: tuple[str, ...] = ()
    """Which weights: 'all-linear', names such as `query value`, or one regular expression."""
    dropout: float | None = None
    """Dropout rate on the adapter's input."""
    method_options: tuple[str, ...] = ()
    """Further options of the method, each as name=value, e.g. init=orthogonal."""


@dataclass(frozen=True)
class RunOptions:
    """Everything that `run` needs."""

    task: Task | None = None
    """'classification' of labeled texts, or 'language' (the next token, for a decoder); by default
    language for a decoder on texts without labels, else classification."""
    texts: DataOptions = field(default_factory=DataOptions)
    rows: RowOptions = field(default_factory=RowOptions)
    base: ModelOptions = field(default_factory=ModelOptions)
    tuning: MethodOptions = field(default_factory=MethodOptions)
    training: TrainConfig = field(default_factory=TrainConfig)
    output: Path = Path("outputs")
    """Folder for the adapter, summary, metrics and checkpoints; a run that was stopped goes on there."""
    probe: bool = True
    """For classification, fit a linear classifier on the frozen model's features first, report what it
    reaches, and start a 'mean_classifier' head from it."""


def open_data(options: DataOptions) -> TextDataset:
    """The data set that the options name.

    Raises:
        PeftError: it cannot be read; or columns or evaluation data are given where they have no use.
    """
    columns = {"text_column": options.text_column, "label_column": options.label_column}
    if options.data == DOCSTRINGS:
        given = {"eval_data": options.eval_data, **columns}
        if useless := [name for name, value in given.items() if value is not None]:
            raise PeftError(f"the data set 'docstrings' takes no {useless[0]}; give a file as data")
        return docstring_dataset()
    if Path(options.data).suffix.lower() in PLAIN_TEXT:
        raise PeftError(
            f"{options.data} is plain text without labels: give a table with a text and a label column, or "
            "a decoder as the model and the task language"
        )
    if options.data.startswith(PREFIX):
        return tfds_dataset(options.data, evaluation_split=options.eval_data, **columns)
    return file_dataset(options.data, options.eval_data, **columns)


def model_folder(name: str) -> Path:
    """The folder of a model: the installed MiniLM, or the folder named."""
    if name == MINILM:
        return minilm_path()
    folder = Path(name)
    if not folder.is_dir():
        raise PeftError(f"the model folder {name} does not exist; give a Hugging Face folder or 'minilm'")
    return folder


def is_decoder(folder: Path) -> bool:
    """Whether the model of a folder scores next tokens."""
    return LANGUAGE_HEAD in read_family(folder)[0].heads


def longest_text(folder: Path) -> int | None:
    """The tokens that a decoder was made for; None for an encoder, which says it itself."""
    family, values = read_family(folder)
    return family.read_config(values).max_positions if is_decoder(folder) else None


def open_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of an encoder or a decoder."""
    return load_tokenizer(folder, decoder=is_decoder(folder))


def open_model(
    options: ModelOptions,
    num_labels: int | None,
    *,
    dtype: str = "float32",
    remat: str = "none",
    seed: int = 0,
) -> tuple[Backbone, Params]:
    """The model with a classification head of `num_labels` columns, drawn from `seed` if new.

    Without `num_labels` it is a decoder with its own output layer.
    """
    folder = model_folder(options.model)
    sentence_encoder = (folder / "1_Pooling" / "config.json").is_file()
    classifier = "mean_classifier" if sentence_encoder else "classifier"
    head = options.head or (LANGUAGE_HEAD if num_labels is None else classifier)
    key = jax.random.key(seed)
    return load(
        folder,
        head=head,
        num_labels=num_labels,
        vocab_size=options.vocab_size,
        redraw_head=options.redraw_head,
        untie=options.untie,
        dtype=dtype,
        remat=remat,
        key=key,
    )


def make_method(options: MethodOptions, steps: int | None = None) -> Transform:
    """The method with the given options, the others at its defaults.

    Args:
        options: the method and what is given of its options.
        steps: optimizer steps of the run, for the options that follow from them.

    Raises:
        PeftError: the method or an option is unknown, or a value does not fit.
    """
    given: dict[str, Any] = {
        name: value for name in ("rank", "alpha", "dropout") if (value := getattr(options, name)) is not None
    }
    if options.targets:
        one_string = len(options.targets) == 1 and (
            options.targets[0] == "all-linear" or _REGEX_CHARACTERS.search(options.targets[0])
        )
        given["targets"] = options.targets[0] if one_string else list(options.targets)
    for pair in options.method_options:
        name, equals, value = pair.partition("=")
        if not equals:
            raise PeftError(f"method option {pair!r} is not of the form name=value")
        try:
            given[name] = parse_yaml(value)
        except ValueError as error:
            raise PeftError(f"method option {name!r} cannot be read: {error}") from error
    for name, value in given.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise PeftError(f"the method's option {name!r} is {value}, but has to be a finite number")
    names = options.method.split("+")
    known = {name: inspect.signature(find_method(name).factory).parameters for name in names}
    for option in given:
        if len(names) > 1 and not any(option in own for own in known.values()):
            raise PeftError(f"none of {', '.join(names)} has an option {option!r}")
    methods = []
    for name in names:
        taken = {option: value for option, value in given.items() if len(names) == 1 or option in known[name]}
        of_steps = METHODS[name].of_steps
        if of_steps is not None and steps is not None:
            taken = {**of_steps(steps), **taken}
        methods.append(build({"name": name, **taken}))
    return methods[0] if len(methods) == 1 else chain(*methods)


def needs_steps(options: MethodOptions) -> bool:
    """Whether `make_method` has to know the steps of the run."""
    infos = [METHODS[name] for name in options.method.split("+") if name in METHODS]
    return any(info.of_steps is not None for info in infos)


def with_new_head(method: Transform, model: Backbone, params: Params) -> Transform:
    """The method, and plain training of what the head has new, as far as the method leaves it."""
    prefix = FAMILIES[model.config.model_type].heads[model.head_name].task_weights
    if prefix is None:
        return method
    frozen, _ = jax.eval_shape(method.init, jax.random.key(0), params)
    left = [
        path
        for path, leaf in tree.named_leaves(frozen.params).items()
        if path.startswith(prefix) and not isinstance(leaf, tree.Hole)
    ]
    return chain(method, unfreeze(left)) if left else method


def start_at_probe(
    method: Transform, model: Backbone, params: Params, weights: Mapping[str, jax.Array]
) -> Params:
    """The parameters with a linear probe in the place of a newly drawn head on the same features.

    Fine-tuning from the probe moves the features less than from a random head (Kumar et al., ICLR
    2022, arXiv 2202.10054). A head that the method adapts instead of training it stays as it is: its
    frozen part could not be drawn again from the seed.
    """
    frozen, _ = jax.eval_shape(method.init, jax.random.key(0), params)
    head = {f"head/classifier/{name}": value for name, value in weights.items()}
    kept = tree.named_leaves(frozen.params)
    if model.head_name != "mean_classifier" or not all(isinstance(kept[path], tree.Hole) for path in head):
        return params
    return tree.replace(params, head)
