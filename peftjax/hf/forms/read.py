"""An adapter that PEFT saved of another type than LoRA, as our method with its frozen part and trainable."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peftjax.core import tree
from peftjax.core.errors import PeftError
from peftjax.core.tree import nearest
from peftjax.hf.adapted import require_bases, require_targets
from peftjax.hf.common import CONFIG, CommonConfig, CommonFile, pattern_value
from peftjax.hf.forms.form import Arrays, Base, Form, array_of
from peftjax.hf.forms.kinds import forms_of, names_in_file
from peftjax.hf.forms.order import in_order
from peftjax.hf.forms.table import form_of_config
from peftjax.hf.names import Model, Names, names_of, require_one_stack
from peftjax.hf.plain import read_plain
from peftjax.hf.tensors import PREFIX, Tensors, read_file
from peftjax.io.files import checked, read_json
from peftjax.methods._pools import in_pools, numbered
from peftjax.methods._weights import SHARED
from peftjax.models.weight_map import Slot
from peftjax.transform.chain import chain
from peftjax.transform.frozen import Frozen, Params, Trainable
from peftjax.transform.registry import build
from peftjax.transform.transform import Transform, part_of
from peftjax.weights.base import dense
from peftjax.weights.canonical import to_canonical
from peftjax.weights.layout import Layout, layout_of

OF_ALL_TYPES = ("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version")
OF_ALL_TYPES += ("revision", "runtime_config")
"""Fields that say nothing of the tensors."""


@dataclass(frozen=True)
class _Module:
    """What one module has: its name in PEFT, the layer of its stack, and our arrays."""

    name: str
    slot: Slot
    arrays: Arrays
    rank: int | None
    alpha: float | None


@dataclass(frozen=True)
class _Group:
    """The parameters whose options are the same."""

    layers: tuple[int, ...] | None
    options: Mapping[str, Any]
    paths: dict[str, list[_Module]]


def form_of(folder: Path) -> Form | None:
    """How a folder's adapter is written, where its type is one of the table."""
    file = folder / CONFIG
    return form_of_config(read_json(file)) if file.is_file() else None


def read_form_file(form: Form, folder: Path, leave_out: Sequence[str] = ()) -> Tensors:
    """The tensors of a folder."""
    shared = [slot.name for slot in form.shared.values()]
    slots = form.with_fields(form.slots, read_form_config(form, folder)[1])
    return read_file(folder, leave_out, own=[*names_in_file(form, slots), *form.unread], shared=shared)


def read_form_config(form: Form, folder: Path) -> tuple[CommonConfig, Any]:
    """What a configuration says: the fields of every type, and those of the form's own.

    Raises:
        PeftError: for a field that is neither, or of another type.
    """
    file = folder / CONFIG
    given = {name: value for name, value in read_json(file).items() if value is not None}
    own = {field.name for field in dataclasses.fields(form.fields)}
    common = {field.name for field in dataclasses.fields(CommonFile)}
    for name, value in given.items():
        if name not in {*own, *common, *OF_ALL_TYPES} and value:
            known = sorted(own | common)
            raise PeftError(
                f"{file} sets {name}, which this reader does not know; closest: {nearest(name, known)}"
            )
    held = checked(CommonFile, {name: value for name, value in given.items() if name in common}, file)
    fields = checked(form.fields, {name: value for name, value in given.items() if name in own}, file)
    return CommonConfig(**held.common()), fields


def import_form(
    form: Form,
    folder: Path,
    model: Model,
    params: Params,
    *,
    leave_out: Sequence[str] = (),
    layouts: Mapping[str, str] | None = None,
) -> tuple[Transform, Frozen, Trainable]:
    """Read an adapter: one method, or a chain where layers or modules have other options than others.

    Raises:
        PeftError: a tensor has no place in the model, another shape, or is missing; the configuration asks
            for something that the method has not here.
    """
    try:
        return _imported(form, folder, model, params, leave_out, layouts)
    except PeftError as error:
        said = str(error)
        raise error if str(folder) in said else PeftError(f"{folder}: {error}") from error


def _imported(
    form: Form,
    folder: Path,
    model: Model,
    params: Params,
    leave_out: Sequence[str],
    layouts: Mapping[str, str] | None,
) -> tuple[Transform, Frozen, Trainable]:
    config, fields = read_form_config(form, folder)
    options = form.to_options(fields)
    file = read_form_file(form, folder, leave_out)
    names, leaves = names_of(model, params), tree.named_leaves(params)
    modules = _modules(form, fields, file, names, leaves, layouts)
    require_targets(config, file, names, leaves, set(modules))
    require_bases(file, names, leaves)
    plain = read_plain(config, file, names, leaves)
    groups = _groups(form, modules, leaves)
    if form.shares and len(groups) > 1:
        raise PeftError(
            f"{form.method}: the adapter's {next(iter(form.slots.values())).name} are of several kinds, by "
            "layer or by module, and its shared arrays belong to one method; give all layers the same "
            "modules and options"
        )
    methods = [_method(form, options, group, layouts) for group in groups]
    if plain:
        methods.append(build({"name": "unfreeze", "targets": "|".join(map(re.escape, plain))}))
    method = methods[0] if len(methods) == 1 else chain(*methods)
    frozen, fresh = method.init(jax.random.key(0), params)
    frozen = dataclasses.replace(frozen, advanced=True)  # it has been trained
    if len(methods) == 1:
        state, trainable = _filled(form, fields, groups[0], file, frozen, fresh)
        return method, dataclasses.replace(frozen, state=state), trainable
    parts, states = list(method.parts), dict(frozen.state)
    for name, group in zip(parts, groups):
        own = part_of(frozen, name, params)
        states[name], fresh[name] = _filled(form, fields, group, file, own, fresh[name])
    if plain:
        kept = fresh[parts[-1]]
        fresh[parts[-1]] = {path: jnp.asarray(plain[path], leaf.dtype) for path, leaf in kept.items()}
    return method, dataclasses.replace(frozen, state=states), fresh


def _modules(
    form: Form,
    fields: Any,
    file: Tensors,
    names: Names,
    leaves: Mapping[str, Any],
    layouts: Mapping[str, str] | None,
) -> dict[str, _Module]:
    """What each module of the file has, by the name of its weight."""
    found: dict[str, _Module] = {}
    of_linear = form.with_fields(form.slots, fields)
    for module, tensors in file.factors.items():
        name, slot = names.place(f"{module}.weight")
        layout = layout_of(slot.path, leaves, layouts)
        require_one_stack(slot, name, layout)
        slots = forms_of(form, of_linear, slot.weight, layout, name)
        held = form.present(slots, tensors)
        tensors = {own: _floats(tensor) for own, tensor in tensors.items()}
        read = {own: array_of(slots[own], tensors) for own in held}
        if missing := [slots[own].name for own, array in read.items() if array is None]:
            raise PeftError(f"tensor {f'{PREFIX}{module}.{missing[0]}'!r} is missing")
        arrays = form.unpacked(read, fields, module)
        if form.of_base is not None:
            shared = _shared_arrays(form, file, form.group(module))
            arrays = form.of_base(arrays, shared, _base(slot, layout, leaves), fields)
        rank = alpha = None
        if form.rank is not None:
            rank = form.rank(arrays) or pattern_value(
                getattr(fields, "rank_pattern", None) or {}, module, fields.r
            )
        if form.alpha is not None:
            value, pattern = (getattr(fields, field) for field in form.alpha)
            alpha = pattern_value(pattern or {}, module, value)
        found[name] = _Module(module, slot, arrays, rank, alpha)
    if form.numbered is None:
        return found
    return {
        name: dataclasses.replace(
            found[name], arrays={**found[name].arrays, **form.numbered(number, len(found), fields)}
        )
        for number, name in enumerate(in_order(names, found))
    }


def _base(slot: Slot, layout: Layout, leaves: Mapping[str, Any]) -> Base:
    """A module's weight and bias, in float32."""
    weight = dense(leaves[slot.path])
    module = tree.module_of(slot.path)
    bias = next((leaves[own] for own in tree.biases(leaves) if tree.module_of(own) == module), None)
    if slot.layer is not None:
        (stack,) = layout.positions("s")
        weight, layout = jnp.take(weight, slot.layer, axis=stack), layout.drop(stack)
        bias = None if bias is None else bias[slot.layer]
    matrix = np.asarray(to_canonical(jnp.asarray(weight), layout), np.float32)
    return Base(matrix, None if bias is None else np.asarray(bias, np.float32).reshape(-1))


def _floats(tensor: np.ndarray) -> np.ndarray:
    return tensor if np.issubdtype(tensor.dtype, np.integer) else tensor.astype(np.float32)


def _groups(form: Form, modules: Mapping[str, _Module], leaves: Mapping[str, Any]) -> list[_Group]:
    """The modules by what their options are: each path once, with all its layers of that kind."""
    kinds: dict[tuple[str, Any], list[_Module]] = {}
    for module in modules.values():
        options = dict(form.of_arrays(module.arrays))
        if module.rank is not None:
            options["rank"] = module.rank
        if module.alpha is not None:
            options["alpha"] = module.alpha
        key = (tuple(sorted(options.items())), tuple(sorted(module.arrays)))
        kinds.setdefault((module.slot.path, key), []).append(module)
    groups: dict[Any, _Group] = {}
    for (path, key), own in kinds.items():
        own = sorted(own, key=lambda module: module.slot.layer or 0)
        layers = tuple(module.slot.layer for module in own if module.slot.layer is not None)
        every = not layers or len(layers) == leaves[path].shape[0]
        chosen = None if every else layers
        # Modules of one group may have other slots, as long as the layers are the same.
        group = groups.setdefault((chosen, key[0]), _Group(chosen, dict(key[0]), {}))
        if path in group.paths:
            group = groups.setdefault((chosen, key), _Group(chosen, dict(key[0]), {}))
        group.paths[path] = own
    return list(groups.values())


def _method(
    form: Form, options: Mapping[str, Any], group: _Group, layouts: Mapping[str, str] | None
) -> Transform:
    arrays = {path: own[0].arrays for path, own in group.paths.items()}
    config = {
        "name": form.method,
        "targets": "|".join(map(re.escape, group.paths)),
        "layers": None if group.layers is None else list(group.layers),
        "layouts": None if layouts is None else dict(layouts),
        **options,
        **group.options,
        **form.of_paths(arrays),
    }
    return build(config)


def _filled(
    form: Form, fields: Any, group: _Group, file: Tensors, frozen: Frozen, fresh: Trainable
) -> tuple[Any, Trainable]:
    """The method's state and trainable with the file's arrays in their places."""
    state, trainable = {**frozen.state}, {**fresh}

    def put(path: str, arrays: Mapping[str, np.ndarray]) -> None:
        for part in (state, trainable):
            if path in part:
                part[path] = {
                    slot: _placed(path, slot, arrays[slot], value) if slot in arrays else value
                    for slot, value in part[path].items()
                }

    for path, modules in group.paths.items():
        stacked, slots = modules[0].slot.layer is not None, modules[0].arrays
        if other := next((m for m in modules if _shapes(m.arrays) != _shapes(slots)), None):
            raise PeftError(
                f"the layers of {path!r} have arrays of different shapes, {_shapes(slots)} and "
                f"{_shapes(other.arrays)} in layer {other.slot.layer}, and should differ in their rank alone"
            )
        if missing := fresh.get(path, {}).keys() - slots.keys():
            raise PeftError(
                f"the file has {sorted(slots)} of {path!r}, and {form.method} of these options has "
                f"{sorted(fresh[path])}: {sorted(missing)} do not fit"
            )
        put(
            path,
            {slot: np.stack([m.arrays[slot] for m in modules]) if stacked else slots[slot] for slot in slots},
        )
    if form.shares:
        put(SHARED, _shared(form, fields, group, file, frozen.plan))
    return state, trainable


def _shared(form: Form, fields: Any, group: _Group, file: Tensors, plan: Any) -> dict[str, np.ndarray]:
    """The arrays that modules share, of all or of each pool."""
    if not form.pooled:
        found, modules = _shared_arrays(form, file), [m.arrays for own in group.paths.values() for m in own]
        return {**found, **form.derived(modules, found, fields)}
    whole: dict[str, np.ndarray] = {}
    for pool, targets in in_pools(plan).items():
        modules = [module for target in targets for module in group.paths[target.path]]
        found = _shared_arrays(form, file, form.group(modules[0].name))
        found = {**found, **form.derived([module.arrays for module in modules], found, fields)}
        whole |= numbered(found, pool)
    return whole


def _shared_arrays(form: Form, file: Tensors, group: str = "") -> dict[str, np.ndarray]:
    """Those that the file has of the model as a whole, or of a group."""
    tensors = {name: _floats(tensor) for name, tensor in file.shared.items()}
    found = {slot: array_of(own, tensors, group) for slot, own in form.shared.items()}
    if missing := [form.shared[slot].name for slot, array in found.items() if array is None]:
        name = missing[0].replace("{group}", group)
        raise PeftError(
            f"the file has no base_model.{name}, which every module uses: PEFT draws it from a seed as "
            "PyTorch does; save the adapter again with save_projection=True"
        )
    return found


def _shapes(arrays: Arrays) -> dict[str, list[int]]:
    return {slot: list(array.shape) for slot, array in arrays.items()}


def _placed(path: str, slot: str, value: np.ndarray, like: Any) -> jax.Array:
    if value.shape != like.shape:
        raise PeftError(
            f"the array {slot!r} of {path!r} has shape {list(value.shape)} in the file; the method has "
            f"{list(like.shape)} there"
        )
    return jnp.asarray(value, like.dtype)
