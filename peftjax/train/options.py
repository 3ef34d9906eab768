"""What to fine-tune, on what and how: the options of a run, shared by the library and the commands."""

from dataclasses import dataclass, field
from pathlib import Path

from peftjax.train.config import Task, TrainConfig
from peftjax.train.data.language.dataset import RowOptions, SourceOptions

MINILM = "minilm"
DOCSTRINGS = "docstrings"


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
