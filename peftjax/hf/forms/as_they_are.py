"""An adapter of PEFT's that is modules of the model trained as they are, both ways."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peftjax.core import tree
from peftjax.core.errors import PeftError
from peftjax.hf.common import CommonConfig
from peftjax.hf.folder import plain_parameters, task_of, write_folder
from peftjax.hf.forms.form import Form
from peftjax.hf.forms.read import read_form_config, read_form_file
from peftjax.hf.names import Model, Names, module_of, names_of
from peftjax.hf.plain import read_plain
from peftjax.hf.tensors import PREFIX, Tensors
from peftjax.hf.trained import require_named, trained_as_they_are
from peftjax.transform.frozen import Frozen, Params, Trainable
from peftjax.transform.registry import build, describe
from peftjax.transform.transform import Transform


def import_modules(
    form: Form, folder: Path, model: Model, params: Params, *, leave_out: Sequence[str] = ()
) -> tuple[Transform, Frozen, Trainable]:
    """Read an adapter: the method of the form, in a chain with `unfreeze` for what is trained beside it.

    Raises:
        PeftError: a tensor has no place in the model, another shape, or is missing.
    """
    config, _ = read_form_config(form, folder)
    file = read_form_file(form, folder, leave_out)
    names, leaves = names_of(model, params), tree.named_leaves(params)
    ends = {slot.name: own for own, slot in form.slots.items()}
    own = {
        f"{module}.{ends[name]}": tensor
        for module, tensors in file.factors.items()
        for name, tensor in tensors.items()
    }
    try:
        _require_modules(config, file, names, {names.canonical(name) for name in own})
        values = read_plain(
            config, dataclasses.replace(file, factors={}, plain={**file.plain, **own}), names, leaves
        )
    except PeftError as error:
        raise PeftError(f"{folder}: {error}") from error
    adapted = {names.place(name)[1].path for name in own}
    parts = {form.method: sorted(adapted), "unfreeze": sorted(values.keys() - adapted)}
    configs = [
        {"name": name, "targets": "|".join(map(re.escape, paths))} for name, paths in parts.items() if paths
    ]
    method = build(configs[0] if len(configs) == 1 else {"name": "chain", "methods": configs})
    frozen, fresh = method.init(jax.random.key(0), params)

    def filled(part: Mapping[str, Any]) -> dict[str, Any]:
        return {path: jnp.asarray(values[path], leaf.dtype) for path, leaf in part.items()}

    if len(configs) == 1:
        return method, frozen, filled(fresh)
    return method, frozen, {name: filled(part) for name, part in fresh.items()}


def _require_modules(config: CommonConfig, file: Tensors, names: Names, held: set[str]) -> None:
    """Raise a PeftError where a tensor of a module that has others, or is asked for by name, is missing."""
    modules = {module_of(name) for name in held}
    for name in names.slots:
        if module_of(name) in modules and name not in held and not file.leaves_out(names.written(name)):
            raise PeftError(
                f"tensor {names.written(name)!r} is missing in the file, which has others beside it"
            )


def export_modules(
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
    """Write the modules that the form's method trains, and what is trained beside them.

    Raises:
        PeftError: something trained has no place in the class, or a module is trained in part.
    """
    leaves = tree.named_leaves(method.apply(frozen, trainable))
    names = names_of(model, leaves)
    trained = trained_as_they_are(frozen, leaves, also, leave_out)
    require_named(sorted(trained), names)
    parts = [(method.name, trainable)] if describe(method)["name"] != "chain" else trainable.items()
    own = {path for name, part in parts if name == form.method for path in part} & trained
    modules = {module_of(name) for name, slot in names.slots.items() if slot.path in own}
    if not modules:
        raise PeftError(f"{method.name}: there is no adapter to write")
    task = task_of(names, modules)
    values, plain = plain_parameters(names, leaves, trained - own, modules, task, None)
    tensors = {f"{PREFIX}{names.written(name)}": tensor for name, tensor in plain.items()}
    for name, slot in names.slots.items():
        module, _, last = name.rpartition(".")
        if module in modules:
            if last not in form.slots:
                raise PeftError(
                    f"{slot.path!r} is trained as a whole module, {module!r}, which has a {last!r} too, for "
                    f"which PEFT's {form.type} has no place; train it by unfreeze"
                )
            tensors[f"{PREFIX}{names.written(module)}.{form.slots[last].name}"] = slot.view(
                np.asarray(leaves[slot.path])
            )
    values |= {
        "base_model_name_or_path": base,
        "inference_mode": True,
        "peft_type": form.type,
        "target_modules": sorted(map(names.written, modules)),
        "task_type": task,
    }
    write_folder(path, values, {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()})
