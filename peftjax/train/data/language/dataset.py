"""A language-modeling data set, and the options that make one from a file."""

from dataclasses import dataclass
from typing import Literal

from peftjax.train.data.language.rows import TokenRows
from peftjax.train.data.language.truncation import Cut

Source = Literal["conversations", "completions", "corpus"]


@dataclass(frozen=True)
class LanguageDataset:
    """Rows to train on and rows to evaluate on, and what did not fit into them."""

    name: str
    source: Source
    train: TokenRows
    evaluation: TokenRows
    train_cut: Cut
    evaluation_cut: Cut


@dataclass(frozen=True)
class SourceOptions:
    """What a file of texts for a language model holds, and where."""

    source: Source | None = None
    """What the file holds; by default found out from its columns."""
    messages_column: str | None = None
    """The column with a chat's messages; guessed from the usual names."""
    prompt_column: str | None = None
    """The column with the prompt; guessed from the usual names."""
    completion_column: str | None = None
    """The column with the completion; guessed from the usual names."""
    text_column: str | None = None
    """The column with the text; guessed from the usual names."""


@dataclass(frozen=True)
class RowOptions:
    """How texts become rows of tokens."""

    separator: str = "\n"
    """Goes between prompt and completion where neither has white space there."""
    train_on_prompt: bool = False
    """Count the loss on prompts too, not on completions or the assistant's turns only."""
    packed: bool = False
    """Put several examples in a row of the greatest length; they do not see each other."""
    attend_across_documents: bool = True
    """In running text, let tokens see the documents before their own in a block."""


@dataclass(frozen=True)
class LanguageOptions(RowOptions, SourceOptions):
    """How a file of texts becomes rows of tokens."""
