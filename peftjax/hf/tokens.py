"""Rows of tables that PEFT trains by themselves: `trainable_token_indices`, here the method `rows`.

PEFT keeps the rows as they are after training, not what they changed by, under `token_adapter` of the table's
module. A table and an output layer that are tied follow the rows of the input embedding together.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from peftjax.core.errors import PeftError
from peftjax.hf.config import LoraConfig
from peftjax.hf.names import Names, module_of
from peftjax.hf.tensors import TOKENS, Tensors
from peftjax.models.weight_map import Slot
from peftjax.weights.base import Weight
from peftjax.weights.rows import TrainedRows


@dataclass(frozen=True)
class Rows:
    """Trained rows of one table: their numbers, their values `[n, D]`, and the table's axes."""

    indices: tuple[int, ...]
    values: np.ndarray
    letters: str

    def same(self, other: Rows) -> bool:
        """Whether both train the same rows to the same values."""
        return self.indices == other.indices and np.array_equal(self.values, other.values)

    def put_into(self, table: np.ndarray) -> np.ndarray:
        """The table with the rows in their places."""
        table = np.array(table)
        (table if self.letters == "io" else table.T)[list(self.indices)] = self.values
        return table


def read_tokens(
    config: LoraConfig, file: Tensors, names: Names, leaves: Mapping[str, Any]
) -> dict[str, Rows]:
    """The trained rows of each table, by path.

    Raises:
        PeftError: a tensor has no place, another shape, or is missing; the rows are outside of the table; a
            table is trained apart from an output layer that is tied to it.
    """
    found: dict[str, dict[str, Rows]] = {}
    for module, values in file.tokens.items():
        name = names.canonical(f"{module}.weight")
        slot = names.uncalled_slots.get(name) or names.place(f"{module}.weight")[1]
        rows = _rows(module, slot, config.tokens_of(module), values, leaves)
        found.setdefault(slot.path, {})[name] = rows
    _require_all(config, file, names, set(found))
    for path in names.tied_weights() & found.keys():
        _require_together(path, found[path], names)
    tables = {path: next(iter(rows.values())) for path, rows in found.items()}
    return tables | dict(_following(tables, file, names, leaves))


def _rows(
    module: str, slot: Slot, indices: tuple[int, ...], values: np.ndarray, leaves: Mapping[str, Any]
) -> Rows:
    leaf = leaves[slot.path]
    if isinstance(leaf, Weight):
        raise PeftError(
            f"the adapter trains rows of {slot.path!r}, which is a {type(leaf).__name__} here; import it on "
            "the plain base"
        )
    rows, width = slot.shape(leaf.shape)
    if values.shape != (len(indices), width):
        raise PeftError(
            f"tensor '{module}.{TOKENS}' has shape {list(values.shape)}; trainable_token_indices and "
            f"{slot.path!r} need {[len(indices), width]}"
        )
    if outside := [index for index in indices if index >= rows]:
        raise PeftError(
            f"trainable_token_indices has {outside[0]}, and {slot.path!r} has {rows} rows: load the model "
            "with vocab_size=N, as many as the adapter's vocabulary has"
        )
    return Rows(indices, values.astype(np.float32), _letters(slot))


def _require_all(config: LoraConfig, file: Tensors, names: Names, found: set[str]) -> None:
    """Raise a PeftError where the configuration asks for rows that are not in the file."""
    for key in config.tokens:
        asked = {
            slot.path
            for name, slot in (*names.slots.items(), *names.tied.items(), *names.uncalled_slots.items())
            if name.endswith(".weight") and names.written(module_of(name)).endswith(key)
        }
        given = found & asked if key else found
        if not given and not file.left_out:
            of_key = f" of {key!r}" if key else ""
            raise PeftError(f"trainable_token_indices asks for rows{of_key} that are not in the file")


def _require_together(path: str, rows: Mapping[str, Rows], names: Names) -> None:
    """Raise a PeftError unless the rows are those of the input embedding, which ties follow, or all equal."""
    weights = [name for name in names.sharing(path) if name.endswith(".weight")]
    embedding = next((name for name, slot in names.uncalled_slots.items() if slot.path == path), weights[0])
    first, *others = rows.values()
    if (set(rows) == {embedding} or rows.keys() >= set(weights)) and all(map(first.same, others)):
        return
    modules = " and of ".join(repr(names.written(module_of(name))) for name in weights)
    raise PeftError(
        f"{path!r} is the weight of {modules} in this model, and the adapter trains rows of "
        f"{', '.join(names.written(module_of(name)) for name in rows)} apart: {names.untying(path)}or leave "
        "them out"
    )


def _following(
    tables: Mapping[str, Rows], file: Tensors, names: Names, leaves: Mapping[str, Any]
) -> Iterator[tuple[str, Rows]]:
    """The rows of an output layer that was untied here alone, where the adapter's own base has it tied."""
    given = {names.place(name)[1].path for name in file.plain}
    at = {slot.path: slot for slot in names.slots.values()}
    for word, other in names.untied:
        if word not in tables or other in tables.keys() | given:
            continue
        one, two = (at[path].view(np.asarray(leaves[path])) for path in (word, other))
        if np.array_equal(one, two):
            yield other, Rows(tables[word].indices, tables[word].values, _letters(at[other]))


def written_tokens(rows: Mapping[str, TrainedRows], names: Names) -> dict[str, Rows]:
    """The rows to write, by the name of the module that PEFT keeps them at.

    Raises:
        PeftError: rows of another weight than a table or an output layer; an output layer that is untied here
            alone has not the rows that PEFT would give it.
    """
    found: dict[str, Rows] = {}
    for path, leaf in rows.items():
        slot = next((slot for slot in names.slots.values() if slot.path == path), None)
        if slot is None or slot.layer is not None or leaf.layout.letters != _letters(slot):
            raise PeftError(
                f"{path!r} is a TrainedRows of its inputs; PEFT's format has a place for the rows of tables "
                "and output layers alone; merge the adapter and save the model instead"
            )
        found[path] = Rows(tuple(np.asarray(leaf.rows).tolist()), leaf.scale * np.asarray(leaf.values),
                           leaf.layout.letters)  # fmt: skip
    for word, output in names.untied:
        table, layer = found.get(word), found.get(output)
        if table is not None and layer is not None and table.same(layer):
            del found[output]
        elif table is not None and (layer is None or layer.indices == table.indices):
            raise PeftError(
                f"{output!r} is tied to {word!r} in the base model, and PEFT would give it the table's rows: "
                "train the same rows of both, or merge the adapter and save the model instead"
            )
    called = {slot.path: name for name, slot in (*names.slots.items(), *names.uncalled_slots.items())}
    return {module_of(called[path]): own for path, own in found.items()}


def _letters(slot: Slot) -> str:
    """The axes of a table, or an output layer, whose rows are those of Hugging Face's weight."""
    return "oi" if slot.weight.transpose else "io"


def tokens_method(path: str, rows: Rows) -> dict[str, Any]:
    """What `build` makes the method of one table's rows from."""
    layouts = None if rows.letters == "io" else {f"^{re.escape(path)}": rows.letters}
    return {"name": "rows", "indices": list(rows.indices), "targets": re.escape(path), "layouts": layouts}
