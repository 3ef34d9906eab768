"""Which tensor of a Hugging Face class is which part of which parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from peftjax.backbone.backbone import Backbone
from peftjax.core import tree
from peftjax.core.errors import PeftError
from peftjax.hf.common import TIED_EMBEDDING
from peftjax.models.families import FAMILIES
from peftjax.models.family import Family
from peftjax.models.shared import DECODER_TABLE, OUTPUT_LAYER, WORD_TABLE
from peftjax.models.weight_map import Slot, TensorEntry, slots_of
from peftjax.weights.layout import Layout

Model = Backbone | Sequence[TensorEntry]
UNTIE = "load the model with untie=True (--untie), "
"""The remedy where an adapter changes an output layer and the table that it is tied to apart."""


@dataclass(frozen=True)
class Names:
    """The tensors of one Hugging Face class, by the names of the table.

    Attributes:
        slots: where each tensor lies in our parameters.
        tied: the same of further names of the same parameters.
        unnamed: paths for which the class has no tensor.
        uncalled: names of modules' tensors in files that the class's forward never calls.
        architecture: the class.
        task: Hugging Face's name of its task.
        prefix: what the backbone's names begin with in the table.
        bare: whether the class's own names lack it.
        canonical: the table's spelling of a name.
        in_memory: the spelling of `transformers`' models.
        uncalled_slots: where the tensors of `uncalled` lie.
        interleaved: whether a model in memory has the outputs of experts' gate and up in turn.
        untied: a table with each parameter that is the same one where the model is not loaded with `untie`.
    """

    slots: Mapping[str, Slot]
    tied: Mapping[str, Slot]
    unnamed: frozenset[str]
    uncalled: frozenset[str] = frozenset()
    architecture: str = "the table"
    task: str | None = None
    prefix: str = ""
    bare: bool = False
    canonical: Callable[[str], str] = str
    in_memory: Callable[[str], str] = str
    uncalled_slots: Mapping[str, Slot] = field(default_factory=dict)
    untied: tuple[tuple[str, str], ...] = ()
    interleaved: bool = False

    def written(self, name: str) -> str:
        """The class's own spelling of a name of the table."""
        return self.in_memory(name).removeprefix(self.prefix if self.bare else "")

    def tied_weights(self) -> set[str]:
        """The parameters that are the weights of several modules."""
        return {slot.path for name, slot in self.tied.items() if name.endswith(".weight")}

    def sharing(self, path: str) -> list[str]:
        """The names of all tensors that a parameter is, its own first."""
        return [name for name, slot in (*self.slots.items(), *self.tied.items()) if slot.path == path]

    def kept_together(self, path: str) -> bool:
        """Whether PEFT heeds a parameter's tie: of an embedding by that name with an output layer alone."""
        names = self.sharing(path)
        tied = len(names) == 2 and self.tied[names[1]].weight.kind == "tied"
        return tied and module_of(names[0]).endswith(TIED_EMBEDDING)

    def untying(self, path: str) -> str:
        """`UNTIE` where a parameter is an output layer too, else nothing."""
        weights = (slot.weight for slot in self.tied.values() if slot.path == path)
        return UNTIE if any(weight.kind == "tied" for weight in weights) else ""

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
        if known in self.uncalled:
            raise PeftError(
                f"{name!r} belongs to a module that {self.architecture} never calls, so that PEFT computes "
                f"without it (it calls {', '.join(map(self.written, self._called(known)))}); leave it out: "
                f"leave_out={[module_of(name)]}"
            )
        if slot is None:
            near = tree.nearest(name, [self.written(other) for other in self.slots])
            raise PeftError(
                f"{name!r} has no place in this model ({self.architecture}); closest: {near}; load the model "
                f"with the head it belongs to, or leave it out: leave_out={[module_of(name)]}"
            )
        return known, slot

    def _called(self, name: str) -> list[str]:
        """What a class calls instead of a module that it never calls."""
        tied = {slot.path for slot in self.tied.values()}
        return [module_of(other) for path in tied for other in self.sharing(path)] or [module_of(name)]


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
            (`peftjax.models.weight_map`: `linear`, `embedding`, `convolution`, `norm`, `TensorEntry`).
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
    word = next((slot for slot in slots.values() if slot.path == WORD_TABLE), None)
    without_calls = {name: word for name in head.uncalled if word is not None}
    for uncalled in head.uncalled & slots.keys():
        path = slots.pop(uncalled).path
        # What is called first stands for the parameter.
        called = next(name for name, slot in tied.items() if slot.path == path)
        slots[called] = tied.pop(called)
    return Names(
        slots,
        tied,
        _without(shapes, slots),
        head.uncalled,
        head.architecture,
        head.task,
        family.prefix,
        head.bare,
        lambda name: family.canonical(_alone(name)),
        head.in_memory or family.in_memory,
        without_calls,
        _untied(model, family, shapes),
        family.interleaved,
    )


def _untied(model: Backbone, family: Family, shapes: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """The word table with each parameter that has its numbers in a model as `config.json` has it."""
    values = getattr(model.config, "values", {})
    tied = not values or family.read_config({**values, "model_type": model.config.model_type}).tied
    own = () if getattr(model.config, "tied", True) or not tied else (OUTPUT_LAYER,)
    return tuple((WORD_TABLE, path) for path in (DECODER_TABLE, *own) if path in shapes)


def _alone(name: str) -> str:
    """A tensor's name in the language model alone, from that in a model that has others beside it."""
    return ".".join(part for part in name.split(".") if part != "language_model")


def _of_known(shapes: Mapping[str, tuple[int, ...]], weights: Sequence[TensorEntry]) -> dict[str, Slot]:
    slots: dict[str, Slot] = {}
    for weight in weights:  # one by one, since a parameter may have several names
        if weight.path in shapes:
            slots |= slots_of({weight.path: shapes[weight.path]}, [weight])
    return slots


def _without(shapes: Mapping[str, tuple[int, ...]], slots: Mapping[str, Slot]) -> frozenset[str]:
    return frozenset(shapes) - {slot.path for slot in slots.values()}
