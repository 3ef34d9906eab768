"""What `adapter.json` says of a trained adapter beside its method, checked when it is read."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from peftjax.adapters.files import CONFIG, read_config
from peftjax.core.errors import PeftError
from peftjax.io.files import checked
from peftjax.train.config import Task
from peftjax.train.data.language.dataset import RowOptions, Source

_NEEDED = ("model", "head", "labels", "max_length")


@dataclass(frozen=True, kw_only=True)
class Noted:
    """What may be noted beside any adapter."""

    model: str | None = None
    """The base model's folder, or 'minilm'."""
    head: str | None = None
    task: Task | None = None
    source: Source | None = None
    """What the texts of a language model were."""
    rows: RowOptions = field(default_factory=RowOptions)
    """How its texts became rows."""
    vocab_size: Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)] | None = None
    """Rows of the model's table, where the training resized it."""
    untied: bool = False
    """Whether the training gave a tied output layer a parameter of its own."""


@dataclass(frozen=True, kw_only=True)
class Info(Noted):
    """What `train` and `import` note beside an adapter."""

    model: str
    head: str
    labels: list[str]
    """The names of the classifier's outputs; of other heads empty."""
    max_length: Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
    """Tokens of a text at most."""


Schema = TypeVar("Schema", bound=Noted)


def read_noted(adapter: Path) -> Noted:
    """What is noted beside an adapter, whoever wrote it.

    Raises:
        PeftError: the folder holds no adapter, or a field is of another type.
    """
    return _as(Noted, adapter, _noted(adapter))


def read_info(adapter: Path) -> Info:
    """What `train` or `import` noted beside an adapter.

    Raises:
        PeftError: the folder holds no adapter, neither made it, or a field is of another type.
    """
    noted = _noted(adapter)
    if missing := [name for name in _NEEDED if name not in noted]:
        raise PeftError(f"{adapter}: the adapter does not say its {missing[0]}; it was not made by `train`")
    return _as(Info, adapter, noted)


def _noted(adapter: Path) -> dict[str, Any]:
    return read_config(adapter)["info"]


def _as(schema: type[Schema], adapter: Path, noted: dict[str, Any]) -> Schema:
    return checked(schema, noted, f"{adapter / CONFIG}, info")
