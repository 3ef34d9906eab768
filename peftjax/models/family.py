"""What a model family tells the loader: its configuration, its heads and its weight names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from peftjax.backbone.backbone import Backbone
from peftjax.core.errors import PeftError
from peftjax.core.tree import nearest
from peftjax.models.quantized.scheme import Stored
from peftjax.models.weight_map import TensorEntry


@dataclasses.dataclass(frozen=True)
class Head:
    """A head of a family.

    Attributes:
        architecture: the Hugging Face class a saved checkpoint names in `config.json`.
        task_weights: prefix of the parameters a pretrained checkpoint may lack altogether; they
            are then drawn at random. None when the head is never drawn.
        labeled: whether its output has one column per label.
        task: Hugging Face's name of the task, such as "SEQ_CLS"; None where it has none.
        bare: whether the class is the backbone alone: its names lack the family's prefix, and it has no
            tensor whose name has another.
        tied: further names of parameters under this class, where they have no tensor of their own, those of
            modules that it calls first (`peftjax.models.shared`).
        uncalled: names in `weights` of modules that the class's forward never calls; what it calls instead
            is in `tied`.
        in_memory: as the family's, where this class's modules have names of their own.
    """

    architecture: str
    task_weights: str | None = None
    labeled: bool = False
    task: str | None = None
    bare: bool = False
    tied: tuple[TensorEntry, ...] = ()
    uncalled: frozenset[str] = frozenset()
    in_memory: Callable[[str], str] | None = None


FEATURES: dict[str, Any] = {"task": "FEATURE_EXTRACTION", "bare": True}
"""What the heads that add no task to a base model have in common, for `Head(..., **FEATURES)`."""


@dataclasses.dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        name: Hugging Face's `model_type`.
        read_config: content of `config.json` -> configuration.
        write_config: configuration -> content of `config.json`.
        build: `(config, head=, dtype=, remat=) -> Backbone`.
        heads: the heads `build` knows by name.
        weights: every parameter with its Hugging Face name; a function of the model where a path has
            another name with another head or setting. `table` reads it.
        canonical: the spelling `weights` uses of a name found in a checkpoint.
        ignored: regular expression of canonical names that carry nothing to load: constants, and what no
            class of the family reads. Everything else that is not read is named in a warning.
        prefix: what the backbone's names begin with in a class that has a head, such as "bert.".
        in_memory: the name of a module's tensor in `transformers`' model, from that in a file; an adapter of
            PEFT's has the former, and `canonical` reads both.
        gathered: the tensors of a file -> those of the table, where one of the latter is part of one of the
            former or several of them.
        scattered: undoes `gathered`, of arrays.
        interleaved: whether a model in memory has the outputs of experts' `gate` and `up` in turn, and not
            one behind the other.
    """

    name: str
    read_config: Callable[[Mapping[str, Any]], Any]
    write_config: Callable[[Any], dict[str, Any]]
    build: Callable[..., Backbone]
    heads: Mapping[str, Head]
    weights: tuple[TensorEntry, ...] | Callable[[Backbone], tuple[TensorEntry, ...]]
    canonical: Callable[[str], str]
    ignored: str = ""
    prefix: str = ""
    in_memory: Callable[[str], str] = str
    gathered: Callable[[Mapping[str, Stored]], dict[str, Stored]] = dict
    scattered: Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]] = dict
    interleaved: bool = False

    def table(self, model: Backbone) -> tuple[TensorEntry, ...]:
        """Every parameter of a model of the family with its Hugging Face name."""
        return self.weights(model) if callable(self.weights) else self.weights


def with_prefix(prefix: str, *heads: str) -> Callable[[str], str]:
    """A `canonical`: the prefix where a checkpoint lacks it, but for names that begin with `heads`."""
    return lambda name: name if name.startswith((prefix, *heads)) else prefix + name


def label_names(names: tuple[str, ...], count: int) -> tuple[str, ...]:
    """Names of `count` labels: those given if they fit, else `LABEL_0` and so on.

    Raises:
        PeftError: when `count` is not positive.
    """
    if count < 1:
        raise PeftError(f"num_labels must be at least 1, not {count}")
    return names if count == len(names) else tuple(f"LABEL_{i}" for i in range(count))


def read_labels(values: Mapping[str, Any]) -> tuple[str, ...]:
    """The labels in the content of a `config.json`, in order; else as many as `num_labels`, or two.

    Raises:
        PeftError: when they are not numbered from 0 on.
    """
    if not values.get("id2label"):
        return label_names((), values.get("num_labels") or 2)
    labels = {int(index): str(label) for index, label in values["id2label"].items() if index.isdecimal()}
    if sorted(labels) != list(range(len(values["id2label"]))):
        keys = list(values["id2label"])[:4]
        raise PeftError(f"config.json: id2label must have the keys '0', '1' and so on, not {keys}")
    return tuple(labels[index] for index in range(len(labels)))


def write_labels(labels: tuple[str, ...]) -> dict[str, Any]:
    """The settings of a `config.json` that name the labels."""
    return {
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }


def require_known(caller: str, name: str, value: Any, known: Iterable[str]) -> None:
    """Raise a PeftError with the nearest names unless `value` is one of the `known`."""
    if value not in known:
        raise PeftError(f"{caller}: {name} {value!r} is not supported; closest: {nearest(str(value), known)}")


def require_settings(caller: str, values: Mapping[str, Any], required: Mapping[str, Any]) -> None:
    """Raise a PeftError for a setting in `values` that is not the only one a backbone computes."""
    for name, only in required.items():
        if values.get(name, only) != only:
            raise PeftError(
                f"config.json sets {name} to {values[name]!r}; {caller} here supports {only!r} only"
            )


def require_size(caller: str, name: str, size: Any) -> None:
    """Raise a PeftError unless `size` is a positive integer."""
    if not isinstance(size, int) or size < 1:
        raise PeftError(f"{caller}: {name} must be a positive integer, not {size!r}")


def require_rate(caller: str, name: str, rate: Any) -> None:
    """Raise a PeftError unless `rate` is a dropout rate."""
    if not isinstance(rate, int | float) or not 0.0 <= rate < 1.0:
        raise PeftError(f"{caller}: {name} must be a number in [0, 1), not {rate!r}")


def require_length(caller: str, length: int, longest: int) -> None:
    """Raise a PeftError when `length` is more than the `longest` sequence that has positions."""
    if length > longest:
        raise PeftError(f"input_ids has {length} positions; this {caller} has {longest}: truncate the inputs")
