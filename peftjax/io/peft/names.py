"""Which tensor of a Hugging Face class is which part of which parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peftjax import tree
from peftjax.errors import PeftError
from peftjax.models.backbone import Backbone
from peftjax.models.load import FAMILIES
from peftjax.models.weight_map import Slot, Weight, slots_of
from peftjax.weights.layout import Layout

Model = Backbone | Sequence[Weight]


@dataclass(frozen=True)
class Names:
    """The tensors of one Hugging Face class, by the names of the table.

    Attributes:
        slots: where each tensor lies in our parameters.
        tied: the same of further names of the same parameters.
        unnamed: paths for which the class has no tensor.
        architecture: the class.
        task: Hugging Face's name of its task.
        prefix: what the backbone's names begin with in the table.
        bare: whether the class's own names lack it.
        canonical: the table's spelling of a name.
        in_memory: the spelling of `transformers`' models.
    """

    slots: Mapping[str, Slot]
    tied: Mapping[str, Slot]
    unnamed: frozenset[str]
    architecture: str = "the table"
    task: str | None = None
    prefix: str = ""
    bare: bool = False
    canonical: Callable[[str], str] = str
    in_memory: Callable[[str], str] = str

    def written(self, name: str) -> str:
        """The class's own spelling of a name of the table."""
        return self.in_memory(name).removeprefix(self.prefix if self.bare else "")

    def tied_weights(self) -> set[str]:
        """The parameters that are the weights of several modules."""
        return {slot.path for name, slot in self.tied.items() if name.endswith(".weight")}

    def in_module(self, module: str) -> list[str]:
        """The tensors of a module and of the modules inside it."""
        return [name for name in self.slots if name.startswith(f"{module}.")]

    def is_leaf(self, module: str) -> bool:
        """Whether a module has tensors of its own and no module inside it."""
        names = self.in_module(module)
        return bool(names) and all(module_of(name) == module for name in names)

    def place(self, name: str) -> tuple[str, Slot]:
        """The table's spelling of a tensor's name, and its place.

        Raises:
            PeftError: there is none.
        """
        known = self.canonical(name)
        slot = self.slots.get(known) or self.tied.get(known)
        if slot is None:
            near = tree.nearest(name, [self.written(other) for other in self.slots])
            raise PeftError(
                f"{name!r} has no place in this model ({self.architecture}); closest: {near}; load the model "
                f"with the head it belongs to, or leave it out: leave_out={[module_of(name)]}"
            )
        return known, slot


def module_of(name: str) -> str:
    """The module that owns a tensor: everything before the last dot."""
    return name.rpartition(".")[0]


def require_one_stack(slot: Slot, name: str, layout: Layout) -> None:
    """Raise a PeftError unless a tensor is all of its parameter, or one layer of a single stack."""
    if len(layout.stack) != (slot.layer is not None):
        raise PeftError(
            f"{slot.path!r} has stack axes {list(layout.stack)} and {name!r} is one matrix of it; this "
            "format has a form for one axis of layers"
        )


def names_of(model: Model, params: Any) -> Names:
    """The names of a model's parameters.

    Args:
        model: a backbone of a known family, whose head says the class; or a table, an entry a parameter
            (`peftjax.models.weight_map`: `linear`, `embedding`, `convolution`, `norm`, `Weight`).
        params: the parameters; rewritten leaves will do.

    Raises:
        PeftError: an entry of a table names no parameter.
    """
    shapes = {path: leaf.shape for path, leaf in tree.named_leaves(params).items()}
    if not isinstance(model, Backbone):
        for weight in model:
            if weight.path not in shapes:
                near = tree.nearest(weight.path, shapes)
                raise PeftError(f"the table names {weight.path!r}, no parameter; closest: {near}")
        slots = _of_known(shapes, [w for w in model if w.kind != "tied"])
        tied = _of_known(shapes, [w for w in model if w.kind == "tied"])
        return Names(slots, tied, _without(shapes, slots))
    family = FAMILIES[model.config.model_type]
    head = family.heads[model.head_name]
    slots = _of_known(shapes, family.table(model))
    if head.bare:
        slots = {name: slot for name, slot in slots.items() if name.startswith(family.prefix)}
    tied = {name: slot for name, slot in _of_known(shapes, head.tied).items() if name not in slots}
    return Names(
        slots,
        tied,
        _without(shapes, slots),
        head.architecture,
        head.task,
        family.prefix,
        head.bare,
        family.canonical,
        family.in_memory,
    )


def _of_known(shapes: Mapping[str, tuple[int, ...]], weights: Sequence[Weight]) -> dict[str, Slot]:
    paths = {weight.path for weight in weights}
    return slots_of({path: shape for path, shape in shapes.items() if path in paths}, weights)


def _without(shapes: Mapping[str, tuple[int, ...]], slots: Mapping[str, Slot]) -> frozenset[str]:
    return frozenset(shapes) - {slot.path for slot in slots.values()}
