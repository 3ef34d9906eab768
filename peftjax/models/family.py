"""What a model family tells the loader: its configuration, its heads and its weight names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from peftjax.models.backbone import Backbone
from peftjax.models.weight_map import Weight


@dataclasses.dataclass(frozen=True)
class Head:
    """A head of a family.

    Attributes:
        architecture: the Hugging Face class a saved checkpoint names in `config.json`.
        task_weights: prefix of the parameters a pretrained checkpoint may lack altogether; they
            are then drawn at random. None when the head is never drawn.
        labelled: whether its output has one column per label.
        task: Hugging Face's name of the task, such as "SEQ_CLS"; None where it has none.
        bare: whether the class is the backbone alone: its names lack the family's prefix, and it has no
            tensor whose name has another.
        tied: further names of parameters under this class, where they have no tensor of their own.
    """

    architecture: str
    task_weights: str | None = None
    labelled: bool = False
    task: str | None = None
    bare: bool = False
    tied: tuple[Weight, ...] = ()


@dataclasses.dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        name: Hugging Face's `model_type`.
        read_config: content of `config.json` -> configuration.
        write_config: configuration -> content of `config.json`.
        build: `(config, head=, dtype=, remat=) -> Backbone`.
        heads: the heads `build` knows by name.
        weights: every parameter with its Hugging Face name.
        canonical: the spelling `weights` uses of a name found in a checkpoint.
        ignored: regular expression of canonical names that carry nothing to load.
        prefix: what the backbone's names begin with in a class that has a head, such as "bert.".
    """

    name: str
    read_config: Callable[[Mapping[str, Any]], Any]
    write_config: Callable[[Any], dict[str, Any]]
    build: Callable[..., Backbone]
    heads: Mapping[str, Head]
    weights: tuple[Weight, ...]
    canonical: Callable[[str], str]
    ignored: str
    prefix: str = ""
