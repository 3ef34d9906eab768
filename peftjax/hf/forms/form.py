"""How PEFT writes a method other than LoRA: its fields, and the tensors of each adapted module."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Arrays = Mapping[str, np.ndarray]
Options = Mapping[str, Any]


@dataclass(frozen=True)
class SlotForm:
    """How PEFT writes an array of one matrix.

    Attributes:
        name: after the module's name and a dot; of the model as a whole, after 'base_model.', with '{row}'
            where each row is a tensor of its own, and '{group}' where each group of modules has its own.
        write: from ours to PEFT's.
        read: from PEFT's to ours.
    """

    name: str
    write: Callable[[Any], Any] = np.asarray
    read: Callable[[Any], Any] = np.asarray


SlotForms = Mapping[str, SlotForm]


@dataclass(frozen=True)
class Base:
    """What a module has without its adapter: the weight `[in, out]` and, where there is one, the bias."""

    weight: np.ndarray
    bias: np.ndarray | None


@dataclass(frozen=True)
class NoFields:
    """The fields of a type that has none of its own."""


@dataclass(frozen=True)
class Form:
    """How a method is written; what PEFT calls `r`, and its patterns, follows from `rank` by itself.

    Attributes:
        method: its name here.
        type: PEFT's `peft_type`.
        slots: the arrays of a module, ours and PEFT's, by our name.
        fields: a dataclass of PEFT's own fields of the type, with their types and defaults.
        to_fields: the values of those that follow from our options.
        to_options: our options that follow from them; raises a PeftError of what is not here.
        rank: of a module by its arrays here, None where they do not tell and PEFT's `r` and its pattern do;
            None altogether where the method has no rank, or one for all weights.
        alpha: PEFT's names of the scale's numerator and of its pattern; None where there is none.
        bias: PEFT's `bias` where the biases of adapted modules are trained; None where it has no such field.
        shared: the arrays of the model as a whole.
        with_fields: `(slots, fields) -> slots`, where the tensors or their meaning depend on a field.
        present: `(slots, tensors) -> names` of the slots that a module's tensors are; by default all.
        of_names: fields that follow from our paths and options: `{PEFT's name: (path, options)} -> fields`.
        of_modules: fields that say which modules have which slots: `{PEFT's name: arrays} -> fields`.
        of_paths: options that say so: `{path: arrays} -> options`.
        of_arrays: options that follow from a module's arrays, such as the size of a block; modules of one
            stack that have others become several methods.
        unread: tensors of a module that say nothing.
        as_they_are: whether the tensors are the parameters of modules themselves, by their names.
        where: PEFT's fields that tell it from another method of the same type.
        variant: PEFT's field that holds more options of such a method, and is null where it is another one.
        patterned: of those, what PEFT calls them, and the pattern by module that it has for them.
        packed: `(arrays, shared arrays, our options) -> arrays` of a module as the file has them, of all that
            the method holds for it.
        unpacked: `(arrays, fields, PEFT's name of the module) -> arrays`, the inverse.
        numbered: arrays of each module that follow from its number among so many, in PEFT's order:
            `(number, count, fields) -> arrays`.
        derived: `(arrays of all modules, shared arrays of the file, fields) -> arrays`, shared ones that
            follow from those; of one pool where there are several.
        pooled: whether arrays are shared by pools of modules, as the method has them.
        group: what PEFT calls the pool of a module.
        packed_shared: shared arrays as the file has them.
        kinds: layers other than linear ones that PEFT's type has: `(forms of a linear layer, the inputs of a
            convolution) -> forms`.
        of_base: `(arrays, shared arrays of the file, base, fields) -> arrays`, where arrays of a module
            follow from its base.
    """

    method: str
    type: str
    slots: SlotForms
    fields: type = NoFields
    to_fields: Callable[[Options], dict[str, Any]] = lambda options: {}
    to_options: Callable[[Any], dict[str, Any]] = lambda fields: {}
    rank: Callable[[Arrays], int | None] | None = None
    alpha: tuple[str, str] | None = None
    bias: str | None = None
    shared: SlotForms = field(default_factory=dict)
    with_fields: Callable[[SlotForms, Any], SlotForms] = lambda slots, fields: slots
    present: Callable[[SlotForms, Arrays], list[str]] = lambda slots, tensors: list(slots)
    of_names: Callable[[Mapping[str, tuple[str, Options]]], dict[str, Any]] = lambda modules: {}
    of_modules: Callable[[Mapping[str, Arrays]], dict[str, Any]] = lambda modules: {}
    of_paths: Callable[[Mapping[str, Arrays]], dict[str, Any]] = lambda paths: {}
    of_arrays: Callable[[Arrays], dict[str, Any]] = lambda arrays: {}
    patterned: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    as_they_are: bool = False
    where: Options = field(default_factory=dict)
    variant: str | None = None
    packed: Callable[[Arrays, Arrays, Options], Arrays] = lambda arrays, shared, options: arrays
    unpacked: Callable[[Arrays, Any, str], Arrays] = lambda arrays, fields, module: arrays
    numbered: Callable[[int, int, Any], Arrays] | None = None
    derived: Callable[[Sequence[Arrays], Arrays, Any], Arrays] = lambda modules, shared, fields: {}
    pooled: bool = False
    group: Callable[[str], str] = str
    packed_shared: Callable[[Arrays], Arrays] = lambda shared: shared
    kinds: Mapping[str, Callable[[SlotForms, Any], SlotForms]] = field(default_factory=dict)
    of_base: Callable[[Arrays, Arrays, Base, Any], Arrays] | None = None

    @property
    def shares(self) -> bool:
        """Whether there are arrays that modules share."""
        return bool(self.shared) or self.pooled


def tensors_of(form: SlotForm, array: np.ndarray, group: str = "") -> dict[str, np.ndarray]:
    """The tensors that an array is in a file."""
    written, name = form.write(array), form.name.replace("{group}", group)
    if "{row}" not in name:
        return {name: written}
    return {name.format(row=row): own for row, own in enumerate(written)}


def array_of(form: SlotForm, tensors: Arrays, group: str = "") -> Any:
    """The array of a file's tensors, or None where it is not there."""
    name = form.name.replace("{group}", group)
    if "{row}" not in name:
        return form.read(tensors[name]) if name in tensors else None
    rows = []
    while (row := name.format(row=len(rows))) in tensors:
        rows.append(tensors[row])
    return form.read(rows) if rows else None


def same(name: str) -> SlotForm:
    """The same array."""
    return SlotForm(name)


def transposed(name: str) -> SlotForm:
    """Its last two axes exchanged."""
    return SlotForm(name, _swapped, _swapped)


def negative(form: SlotForm) -> SlotForm:
    """Another form's array with the other sign."""
    return SlotForm(form.name, lambda v: -form.write(v), lambda v: -form.read(v))


def column(name: str) -> SlotForm:
    """A vector as [n, 1]."""
    return SlotForm(name, lambda v: v[:, None], lambda v: v.reshape(-1))


def row(name: str) -> SlotForm:
    """A vector as [1, n]."""
    return SlotForm(name, lambda v: v[None], lambda v: v.reshape(-1))


def _swapped(matrix: np.ndarray) -> np.ndarray:
    return matrix.swapaxes(-1, -2)
