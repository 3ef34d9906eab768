"""Parameters that have several names at Hugging Face, and what a checkpoint's tensors say about them."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftjax.errors import PeftError
from peftjax.io.safetensors import Tensor, same_numbers
from peftjax.models.backbone import Backbone
from peftjax.models.family import Family
from peftjax.models.weight_map import Weight

WORD_TABLE = "embed/word/embedding"
OUTPUT_LAYER = "head/output/kernel"

logger = logging.getLogger(__name__)


def names_in_file(family: Family, model: Backbone) -> dict[str, tuple[str, ...]]:
    """The names under which a file may hold each parameter that has several, by its name in the table.

    First are those of the modules that the model's class calls, then the table's, then those of the family's
    other classes. An output layer is one of them where the configuration ties it to the word table.
    """
    table = {weight.path: weight.name for weight in family.table(model)}
    tied = getattr(model.config, "tied", False)
    own = family.heads[model.head_name].tied
    others = tuple(weight for head in family.heads.values() for weight in head.tied)

    def known(weights: tuple[Weight, ...], path: str) -> list[str]:
        return [w.name for w in weights if w.path == path and (tied or not _is_output(w))]

    found = {}
    for path in {weight.path for weight in others} & table.keys():
        names = (*known(own, path), table[path], *known(others, path))
        found[table[path]] = tuple(dict.fromkeys(names))
    return found


def names_to_read(family: Family, model: Backbone, *, untie: bool = False) -> dict[str, tuple[str, ...]]:
    """As `names_in_file`; with `untie`, an output layer that a file lacks is read from the word table."""
    found = names_in_file(family, model)
    table = {weight.path: weight.name for weight in family.table(model)}
    if not untie or getattr(model.config, "tied", True) or OUTPUT_LAYER not in table:
        return found
    word, own = table[WORD_TABLE], table[OUTPUT_LAYER]
    return {**found, own: (own, *found.get(word, (word,)))}


def untied(family: Family, config: Any, head: str) -> Any:
    """The configuration with an output layer that is a parameter of its own.

    Raises:
        PeftError: the head has none.
    """
    if not any(_is_output(weight) for weight in family.heads[head].tied):
        having = [name for name, spec in family.heads.items() if any(map(_is_output, spec.tied))]
        known = f"heads that have: {', '.join(having)}" if having else "no head of the family has"
        raise PeftError(
            f"the head {head!r} of a {family.name} has no output layer tied to the word table, to be untied; "
            f"{known}"
        )
    return dataclasses.replace(config, tied=False)


def settle(family: Family, config: Any, tensors: Mapping[str, Tensor], folder: Path) -> Any:
    """The configuration with what a checkpoint's tensors decide: whether the output layer is the word table.

    Where `config.json` ties the two and the file holds both with other numbers, each is used as it stands
    there, which is what the newer transformers does: it even calls every T5 tied.

    Args:
        family: the family.
        config: what `config.json` says.
        tensors: the checkpoint's, by their canonical names.
        folder: the checkpoint.

    Raises:
        PeftError: when a tensor cannot be read.
    """
    if not getattr(config, "tied", False):
        return config
    model = family.build(config, head="none")
    outputs = [w.name for head in family.heads.values() for w in head.tied if _is_output(w)]
    output = next((tensors[name] for name in outputs if name in tensors), None)
    word = next(weight.name for weight in family.table(model) if weight.path == WORD_TABLE)
    names = (word, *(name for name in names_in_file(family, model)[word] if name not in outputs))
    table = next((tensors[name] for name in names if name in tensors), None)
    if output is None or table is None or same_numbers(output, table):
        return config
    logger.warning(
        "%s: config.json ties %s to %s, and the file holds another one: the file's is used, untied",
        folder,
        output.name,
        table.name,
    )
    return dataclasses.replace(config, tied=False)


def copies(family: Family, model: Backbone, tensors: Mapping[str, Tensor], folder: Path) -> set[str]:
    """The tensors of a checkpoint, by canonical name, that repeat one which is read under another name.

    Raises:
        PeftError: where modules that the class calls each have a table of words, and those differ.
    """
    own = {w.name for w in family.heads[model.head_name].tied if w.kind == "embedding"}
    found: set[str] = set()
    for name, names in names_in_file(family, model).items():
        first, *more = [other for other in names if other in tensors] or [name]
        for other in more:
            if same_numbers(tensors[first], tensors[other]):
                found.add(other)
            elif own and other in own | {name}:
                raise PeftError(
                    f"{folder} holds {first} and {other} with other numbers; in this {family.name} they are "
                    "one table: remove one of the two from the file"
                )
    return found


def _is_output(weight: Weight) -> bool:
    """Whether a further name is that of an output layer that shares the word table."""
    return weight.kind == "tied" and weight.path == WORD_TABLE
