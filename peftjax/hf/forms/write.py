"""A trained adapter of another type than LoRA, as a folder that Hugging Face's PEFT loads."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from peftjax.core import tree
from peftjax.core.errors import PeftError
from peftjax.core.targets import pattern_value
from peftjax.hf.folder import fan_in_fan_out, plain_parameters, task_of, write_folder
from peftjax.hf.forms.form import Form, SlotForms, tensors_of
from peftjax.hf.forms.kinds import forms_of
from peftjax.hf.forms.order import in_order
from peftjax.hf.forms.table import BY_METHOD
from peftjax.hf.names import Model, Names, module_of, names_of, require_one_stack
from peftjax.hf.replication import METHOD as REPLICATION
from peftjax.hf.replication import ranges_of
from peftjax.hf.tensors import OF_MODEL, PREFIX
from peftjax.hf.trained import lies_in, require_named, trained_as_they_are
from peftjax.methods._pools import of_pool
from peftjax.methods._targets import Target
from peftjax.methods._weights import SHARED
from peftjax.transform.frozen import Frozen, Trainable
from peftjax.transform.registry import describe
from peftjax.transform.transform import Transform, part_of

AS_THEY_ARE = ("unfreeze", "bitfit")
"""Methods whose parameters are written as they are beside any adapter."""
BESIDE = (*AS_THEY_ARE, REPLICATION)
"""Methods that a chain may have beside those of a form."""


def form_written(method: Transform) -> Form | None:
    """How a method is written, where it, or a part of the chain, is one of the table."""
    names = {*_names(describe(method))} - {*BESIDE}
    forms = {name: BY_METHOD[name] for name in names if name in BY_METHOD}
    found = [form for name, form in forms.items() if not form.as_they_are or {name} == names]
    return found[0] if len(found) == 1 else None


def _names(config: Mapping[str, Any]) -> list[str]:
    return [part["name"] for part in config["methods"]] if config["name"] == "chain" else [config["name"]]


def export_form(
    form: Form,
    path: Path,
    model: Model,
    method: Transform,
    frozen: Frozen,
    trainable: Trainable,
    *,
    base: str | None = None,
    also: Collection[str] = (),
    leave_out: Sequence[str] = (),
) -> None:
    """Write an adapter of the form, and what is trained as it is beside it.

    Raises:
        PeftError: something trained has no place in the class or beside this type of adapter.
    """
    parts = _parts(form, method, frozen, trainable)
    leaves = tree.named_leaves(method.apply(dataclasses.replace(frozen, advanced=True), trainable))
    names = names_of(model, leaves)
    adapted = {target.path: target for part in parts for target in part.targets}
    left = [path for path in adapted if lies_in(path, leave_out)]
    trained = trained_as_they_are(frozen, leaves, also, leave_out) - adapted.keys()
    require_named([path for path in (*adapted, *sorted(trained)) if path not in left], names)
    modules: dict[str, _Written] = {}
    for part in parts:
        modules |= part.modules(form, names, left)
    if not modules:
        raise PeftError(f"{method.name}: there is no adapter to write")
    task = task_of(names, modules)
    values, plain = plain_parameters(names, leaves, trained, modules, task, form.bias)
    if form.numbered is not None:
        _require_numbers(form, names, parts[0].options, modules)
    written = {names.written(module): own for module, own in modules.items()}
    shared = {slot: np.asarray(array) for slot, array in parts[0].shared.items()}
    tensors = {f"{PREFIX}{names.written(name)}": tensor for name, tensor in plain.items()} | {
        f"{PREFIX}{module}.{name}": tensor
        for module, own in written.items()
        for slot, array in form.packed(own.arrays, _shared_by(form, shared, own), own.options).items()
        if slot in own.forms
        for name, tensor in tensors_of(own.forms[slot], array).items()
    }
    tensors |= {f"{OF_MODEL}{name}": tensor for name, tensor in _of_model(form, shared, written).items()}
    layouts = {path: target.layout for path, target in adapted.items()}
    values |= {
        "base_model_name_or_path": base,
        "inference_mode": True,
        "peft_type": form.type,
        "target_modules": sorted(written),
        "task_type": task,
        **form.to_fields(parts[0].options),
        **form.of_names({module: (own.target.path, own.options) for module, own in written.items()}),
        **form.of_modules({module: own.arrays for module, own in written.items()}),
        **_patterns(form, written),
        **ranges_of(describe(method)),
    }
    if "fan_in_fan_out" in {field.name for field in dataclasses.fields(form.fields)}:
        values["fan_in_fan_out"] = fan_in_fan_out(names, layouts, modules)
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    write_folder(path, values, contiguous)


@dataclasses.dataclass(frozen=True)
class _Written:
    """One module of the file."""

    arrays: Mapping[str, np.ndarray]
    forms: SlotForms
    target: Target
    alpha: float | None
    options: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class _Part:
    """One method of the form: its options, its targets, and all of its arrays."""

    options: Mapping[str, Any]
    targets: tuple[Target, ...]
    slots: Mapping[str, Mapping[str, Any]]

    @property
    def shared(self) -> Mapping[str, Any]:
        """Those of the model as a whole."""
        return self.slots.get(SHARED, {})

    def modules(self, form: Form, names: Names, left: Sequence[str]) -> dict[str, _Written]:
        """Its modules, by the table's names."""
        targets = {target.path: target for target in self.targets if target.path not in left}
        for name, slot in names.tied.items():
            if slot.path in targets and name.endswith(".weight"):
                raise PeftError(
                    f"{slot.path!r} is the weight of {name!r} too, and {form.type} has no form for weights "
                    "that several modules share: load the model with untie=True, leave it out, or merge"
                )
        found, of_linear = {}, form.with_fields(form.slots, _fields(form, self.options))
        for name, slot in names.slots.items():
            target = targets.get(slot.path)
            if target is None:
                continue
            require_one_stack(slot, name, target.layout)
            forms = forms_of(form, of_linear, slot.weight, target.layout, name)
            row: Any = ...
            if slot.layer is not None:
                chosen = range(target.layout.stack[0]) if target.layers is None else target.layers
                if slot.layer not in chosen:
                    continue
                row = list(chosen).index(slot.layer)
            arrays = {slot: np.asarray(array)[row] for slot, array in self.slots[target.path].items()}
            if unknown := (of_linear.keys() - forms.keys()) & arrays.keys():
                raise PeftError(
                    f"{slot.path!r} has {min(unknown)!r}, which PEFT's {form.type} has not for a weight "
                    f"of kind {slot.weight.kind!r}; leave it out, or merge"
                )
            alpha = None
            if form.alpha is not None:
                alpha = pattern_value(target.path, self.options.get("alpha_pattern"), self.options["alpha"])
            found[module_of(name)] = _Written(arrays, forms, target, alpha, self.options)
        return found


def _shared_by(form: Form, shared: Mapping[str, Any], own: _Written) -> Mapping[str, Any]:
    """The shared arrays that a module uses."""
    return of_pool(shared, own.target) if form.pooled else shared


def _of_model(
    form: Form, shared: Mapping[str, Any], written: Mapping[str, _Written]
) -> dict[str, np.ndarray]:
    """The tensors of the model as a whole, or of each group of its modules."""
    found: dict[str, np.ndarray] = {}
    seen: set[tuple[str, Any]] = set()
    for module, own in written.items():
        group, pool = (form.group(module), getattr(own.target, "pool", None)) if form.pooled else ("", None)
        if not form.shared or (group, pool) in seen:
            continue
        seen.add((group, pool))
        arrays = form.packed_shared(_shared_by(form, shared, own))
        for slot, slot_form in form.shared.items():
            for name, tensor in tensors_of(slot_form, arrays[slot], group).items():
                if name in found and not np.array_equal(found[name], tensor):
                    raise PeftError(
                        f"{form.method}: {module!r} and others share base_model.{name} in PEFT, and have "
                        "different ones here; export them apart, or merge"
                    )
                found[name] = tensor
    return found


def _parts(form: Form, method: Transform, frozen: Frozen, trainable: Trainable) -> list[_Part]:
    """The methods of the form in a chain, or the one; the others may only train parameters as they are."""
    config = describe(method)
    if config["name"] != "chain":
        return [_part(config, frozen, trainable)]
    found = []
    for own, name in zip(config["methods"], method.parts):
        if own["name"] == form.method:
            found.append(_part(own, part_of(frozen, name, frozen.params), trainable[name]))
        elif own["name"] not in BESIDE and not BY_METHOD.get(own["name"], form).as_they_are:
            raise PeftError(
                f"{form.method} is chained with {own['name']}, which PEFT's {form.type} has no form for; "
                "export them apart, or merge one of them"
            )
    first = _unlike_rank(found[0].options)
    for own in found[1:]:
        if form.to_fields(own.options) != form.to_fields(found[0].options) or form.shares:
            raise PeftError(
                f"the chain's {form.method} have different options, {first} and {_unlike_rank(own.options)}, "
                "and PEFT has one configuration for all modules; export them apart"
            )
    return found


def _require_numbers(
    form: Form, names: Names, options: Mapping[str, Any], modules: Mapping[str, _Written]
) -> None:
    """Raise a PeftError where PEFT would number the modules otherwise than the method does."""
    assert form.numbered is not None
    fields = _fields(form, options)
    ordered = in_order(names, [f"{module}.weight" for module in modules])
    for number, name in enumerate(ordered):
        own = modules[module_of(name)].arrays
        for slot, wanted in form.numbered(number, len(ordered), fields).items():
            if not np.array_equal(own[slot], wanted):
                raise PeftError(
                    f"{form.method}: the {slot} of {name!r} is {own[slot]} here and {wanted} in PEFT, which "
                    "orders modules by their class; merge it"
                )


def _unlike_rank(options: Mapping[str, Any]) -> dict[str, Any]:
    where = ("name", "targets", "exclude", "layers", "layers_pattern", "layouts", "rank", "rank_pattern")
    return {name: value for name, value in options.items() if name not in where}


def _part(config: Mapping[str, Any], frozen: Frozen, trainable: Trainable) -> _Part:
    paths = frozen.state.keys() | trainable.keys()
    slots = {path: {**frozen.state.get(path, {}), **trainable.get(path, {})} for path in paths}
    return _Part(config, frozen.plan, slots)


def _fields(form: Form, options: Mapping[str, Any]) -> Any:
    """PEFT's fields that our options give."""
    return form.fields(**form.to_fields(options))


def _patterns(form: Form, modules: Mapping[str, _Written]) -> dict[str, Any]:
    """The commonest rank, alpha and the like, and patterns for the modules that have others."""
    values: dict[str, Any] = {}
    wanted = []
    if form.rank is not None:
        wanted.append(("r", "rank_pattern", {name: own.target.rank for name, own in modules.items()}))
    if form.alpha is not None:
        wanted.append((*form.alpha, {name: own.alpha for name, own in modules.items()}))
    for option, names in form.patterned.items():
        wanted.append((*names, {name: form.of_arrays(own.arrays)[option] for name, own in modules.items()}))
    known = {field.name for field in dataclasses.fields(form.fields)}
    for field, pattern, of in wanted:
        counts = Counter(of.values())
        values[field] = max(counts, key=lambda value: (counts[value], value))
        others = {module: value for module, value in of.items() if value != values[field]}
        if pattern not in known:
            if others:
                module, value = next(iter(others.items()))
                raise PeftError(
                    f"{module!r} has {field} {value} and most others have {values[field]}, and PEFT's "
                    f"{form.type} has one for all modules; export them apart"
                )
            continue
        # PEFT puts other patterns than those of ranks behind a dot, but takes a module's own name first.
        whole = field in (names[0] for names in form.patterned.values())
        values[pattern] = {
            module if whole else f"^{re.escape(module)}": value for module, value in others.items()
        }
    return values
