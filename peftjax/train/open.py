"""What a run opens: a base model's folder, its tokenizer and its weights, and labeled texts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from peftjax.backbone.backbone import Backbone, Params
from peftjax.core.errors import PeftError
from peftjax.models.families import CONFIG_FILE, family_of, read_family
from peftjax.models.family import Family
from peftjax.models.load import build_model, load
from peftjax.models.minilm import minilm_path
from peftjax.models.named import named_config, named_models
from peftjax.text.tokenizer import Tokenizer, load_tokenizer
from peftjax.train.data.dataset import TextDataset
from peftjax.train.data.docstrings import docstring_dataset
from peftjax.train.data.files import DataFile, file_dataset
from peftjax.train.data.language.corpus import PLAIN_TEXT
from peftjax.train.data.tfds import PREFIX, tfds_dataset
from peftjax.train.options import DOCSTRINGS, MINILM, DataOptions, ModelOptions

LANGUAGE_HEAD = "causal_lm"
"""The head of a decoder that scores the next token."""


@dataclass(frozen=True)
class BaseModel:
    """A base model's folder and its config.json, read once."""

    name: str
    """As it was asked for."""
    folder: Path
    family: Family
    config: dict[str, Any]
    """The content of config.json."""

    @property
    def is_decoder(self) -> bool:
        """Whether the model scores next tokens."""
        return LANGUAGE_HEAD in self.family.heads


def find_base(name: str) -> BaseModel:
    """The base model of that name: the installed MiniLM, or a Hugging Face folder.

    Raises:
        PeftError: there is no such folder, or its config.json is of no supported model.
    """
    folder = minilm_path() if name == MINILM else Path(name)
    if not folder.is_dir():
        what = (
            f"{name} is a configuration without weights, for `peftjax plan` alone"
            if name in named_models()
            else f"the model folder {name} does not exist"
        )
        raise PeftError(f"{what}; give a Hugging Face folder or 'minilm'")
    return BaseModel(name, folder, *read_family(folder))


def find_config(name: str) -> BaseModel:
    """`find_base` of what has no weights too: a `config.json`, or a name such as "llama-3-8b".

    Raises:
        PeftError: there is no such folder, file or name, or the configuration is of no supported model.
    """
    path = Path(name)
    if name == MINILM or path.is_dir():
        return find_base(name)
    if path.name == CONFIG_FILE and path.is_file():
        return BaseModel(name, path.parent, *read_family(path.parent))
    if name in named_models():
        config = named_config(name)
        return BaseModel(name, path, family_of(config, name), config)
    known = (MINILM, *named_models())
    raise PeftError(
        f"the model {name} does not exist; give a Hugging Face folder, its config.json, or one of "
        f"{', '.join(known)}"
    )


def longest_text(base: BaseModel) -> int | None:
    """The tokens that a decoder was made for; None for an encoder, which says it itself."""
    return base.family.read_config(base.config).max_positions if base.is_decoder else None


def open_tokenizer(base: BaseModel) -> Tokenizer:
    """The tokenizer of an encoder or a decoder."""
    return load_tokenizer(base.folder, decoder=base.is_decoder, config=base.config)


def default_head(base: BaseModel, num_labels: int | None) -> str:
    """The head for so many labels; without labels, that of a decoder's next token."""
    if num_labels is None:
        return LANGUAGE_HEAD
    is_sentence_encoder = (base.folder / "1_Pooling" / "config.json").is_file()
    return "mean_classifier" if is_sentence_encoder else "classifier"


def open_model(
    base: BaseModel,
    options: ModelOptions,
    num_labels: int | None,
    *,
    dtype: str = "float32",
    remat: str = "none",
    seed: int = 0,
    mesh: Mesh | None = None,
) -> tuple[Backbone, Params]:
    """The model with a classification head of `num_labels` columns, drawn from `seed` if new.

    Without `num_labels` it is a decoder with its own output layer.
    """
    return load(
        base.folder,
        head=options.head or default_head(base, num_labels),
        num_labels=num_labels,
        vocab_size=options.vocab_size,
        redraw_head=options.redraw_head,
        untie=options.untie,
        dtype=dtype,
        remat=remat,
        key=jax.random.key(seed),
        mesh=mesh,
        described=(base.family, base.config),
    )


def abstract_model(
    base: BaseModel, options: ModelOptions, num_labels: int | None, *, dtype: str, remat: str
) -> tuple[Backbone, Params]:
    """`open_model` of config.json alone: the model, and the shapes of its parameters.

    What only the weights' file says is not known: a vocabulary of another size, an output layer of its own.
    """
    model = build_model(
        base.family,
        base.family.read_config(base.config),
        options.head or default_head(base, num_labels),
        num_labels=num_labels,
        vocab_size=options.vocab_size,
        untie=options.untie,
        dtype=dtype,
        remat=remat,
    )
    return model, jax.eval_shape(model.init, jax.random.key(0))


def open_data(options: DataOptions, file: DataFile | None = None) -> TextDataset:
    """The labeled texts that the options name; `file` is theirs, where it is open already.

    Raises:
        PeftError: they cannot be read; or columns or evaluation data are given where they have no use.
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
    return file_dataset(file or options.data, options.eval_data, **columns)
