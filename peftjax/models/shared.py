"""Parameters that have several names at Hugging Face, and what a checkpoint's tensors say about them."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftjax.backbone.backbone import Backbone
from peftjax.core.errors import PeftError
from peftjax.io.safetensors import Tensor, same_numbers
from peftjax.models.family import Family
from peftjax.models.weight_map import TensorEntry

WORD_TABLE = "embed/word/embedding"
OUTPUT_LAYER = "head/output/kernel"
DECODER_TABLE = "embed/decoder_word/embedding"

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

    def known(weights: tuple[TensorEntry, ...], path: str) -> list[str]:
        return [w.name for w in weights if w.path == path and (tied or not _is_output(w))]

    found = {}
    for path in {weight.path for weight in others} & table.keys():
        names = (*known(own, path), table[path], *known(others, path))
        found[table[path]] = tuple(dict.fromkeys(names))
    if getattr(model.config, "apart", False):
        for name in _tables_of_stacks(family):
            found[name] = (name, *(other for other in _tables(family) if other != name))
    return found


def names_to_read(family: Family, model: Backbone, *, untie: bool = False) -> dict[str, tuple[str, ...]]:
    """As `names_in_file`, and for an output layer that a file lacks, those of the word table.

    That is so with `untie`, and in an encoder-decoder, which newer versions of transformers always call tied.
    """
    found = names_in_file(family, model)
    table = {weight.path: weight.name for weight in family.table(model)}
    follows = untie or bool(_tables_of_stacks(family))
    if not follows or getattr(model.config, "tied", True) or OUTPUT_LAYER not in table:
        return found
    word, own = table[WORD_TABLE], table[OUTPUT_LAYER]
    return {**found, own: (own, *(_tables(family) or found.get(word, (word,))))}


def untied(family: Family, config: Any, head: str) -> Any:
    """The configuration with a parameter for each of the modules that share the word table in a head.

    Raises:
        PeftError: there is one such module alone.
    """
    tied = family.heads[head].tied
    changes = {"tied": False} if any(map(_is_output, tied)) else {}
    if sum(weight.kind == "embedding" for weight in tied) > 1:
        changes["apart"] = True
    if not changes:
        having = [name for name, spec in family.heads.items() if any(map(_is_output, spec.tied))]
        known = f"heads that have: {', '.join(having)}" if having else "no head of the family has"
        raise PeftError(
            f"the head {head!r} of a {family.name} has no output layer tied to the word table, to be untied; "
            f"{known}"
        )
    return dataclasses.replace(config, **changes)


def settle(family: Family, config: Any, tensors: Mapping[str, Tensor], folder: Path) -> Any:
    """The configuration with what a checkpoint's tensors decide: which modules share the word table.

    Where `config.json` ties the output layer to the table, or encoder and decoder share one, and the file
    holds both with other numbers, each is used as it stands there. That is what the newer transformers does:
    it even calls every T5 tied.

    Args:
        family: the family.
        config: what `config.json` says.
        tensors: the checkpoint's, by their canonical names.
        folder: the checkpoint.

    Raises:
        PeftError: when a tensor cannot be read.
    """
    tied = getattr(config, "tied", False)
    if not tied and not _tables_of_stacks(family):
        return config
    model = family.build(config, head="none")
    outputs = [w.name for head in family.heads.values() for w in head.tied if _is_output(w)]
    word = next(weight.name for weight in family.table(model) if weight.path == WORD_TABLE)
    names = _tables(family) or (word, *names_in_file(family, model)[word])
    first = next((tensors[name] for name in names if name in tensors and name not in outputs), None)
    if first is None:
        return config
    table, *others = (tensors.get(name, first) for name in _tables_of_stacks(family) or (word,))
    for other in others:
        if not same_numbers(table, other):
            logger.warning(
                "%s: %s and %s have other numbers: each stack uses its own", folder, table.name, other.name
            )
            config = dataclasses.replace(config, apart=True)
    output = next((tensors[name] for name in outputs if name in tensors), first)
    if not tied or same_numbers(output, table):
        return config
    logger.warning(
        "%s: config.json ties %s to %s, and the file holds another one: the file's is used, untied",
        folder,
        output.name,
        table.name,
    )
    return dataclasses.replace(config, tied=False)


def copies(family: Family, model: Backbone, tensors: Mapping[str, Tensor]) -> set[str]:
    """The tensors of a checkpoint, by canonical name, that repeat one which is read under another name."""
    found: set[str] = set()
    for name, names in names_in_file(family, model).items():
        first, *more = [other for other in names if other in tensors] or [name]
        found |= {other for other in more if same_numbers(tensors[first], tensors[other])}
    return found


def _is_output(weight: TensorEntry) -> bool:
    """Whether a further name is that of an output layer that shares the word table."""
    return weight.kind == "tied" and weight.path == WORD_TABLE


def _tables_of_stacks(family: Family) -> tuple[str, ...]:
    """The names of the tables that the stacks of an encoder-decoder call, the encoder's first; else none."""
    tied = (weight for head in family.heads.values() for weight in head.tied)
    return tuple(dict.fromkeys(w.name for w in tied if w.kind == "embedding" and w.path == WORD_TABLE))


def _tables(family: Family) -> tuple[str, ...]:
    """Those and, before them, the one that stands for each of them that a file lacks."""
    uncalled = (name for head in family.heads.values() for name in sorted(head.uncalled))
    return tuple(dict.fromkeys((*uncalled, *_tables_of_stacks(family)))) if _tables_of_stacks(family) else ()
