"""What a folder for PEFT has whatever the adapter's type: parameters trained as they are, and two files."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from peftjax.core.errors import PeftError
from peftjax.hf.common import CONFIG, TASK_MODULES, TENSORS
from peftjax.hf.names import Names, module_of
from peftjax.io.files import replacing
from peftjax.io.safetensors import write_tensors
from peftjax.weights.base import dense
from peftjax.weights.layout import Layout


def write_folder(folder: Path, values: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
    """Write the configuration and the tensors; both are complete before either replaces what was there."""
    with replacing(folder / TENSORS, folder / CONFIG) as (tensor_file, config_file):
        text = json.dumps(values, indent=2, sort_keys=True)
        config_file.write_text(text + "\n", encoding="utf-8")
        write_tensors(tensor_file, tensors, {"format": "pt"})


def fan_in_fan_out(names: Names, layouts: Mapping[str, Layout], modules: Collection[str]) -> bool:
    """Whether Hugging Face keeps the linear weights as [in, out], as GPT-2's Conv1D does."""
    slots = [slot for name, slot in names.slots.items() if module_of(name) in modules]
    linear = [slot for slot in slots if slot.path in layouts and slot.weight.kind == "linear"]
    letters = [layouts[slot.path].letters.replace("s", "") for slot in linear]
    return bool(linear) and all(
        (order == "io") != slot.weight.transpose for order, slot in zip(letters, linear)
    )


def task_of(names: Names, modules: Collection[str]) -> str | None:
    """The class's task; None when it would make PEFT save an output layer that has an adapter."""
    own = TASK_MODULES.get(names.task or "", ())
    return None if any(module.endswith(own) for module in modules if own) else names.task


def _owners(name: str) -> list[str]:
    """The module that owns a tensor, and those it lies in."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def plain_parameters(
    names: Names,
    leaves: Mapping[str, Any],
    trained: set[str],
    modules: Collection[str],
    task: str | None,
    of_adapted: str | None = "lora_only",
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The fields of the configuration for what is trained as it is, and its tensors by name.

    Args:
        names: of the class's tensors.
        leaves: all parameters by path.
        trained: paths of those trained as they are.
        modules: the adapted ones.
        task: PEFT's name of the task.
        of_adapted: what PEFT's `bias` is where those of adapted modules are trained; None where the type has
            no such field.

    Raises:
        PeftError: a part of a module of experts is trained, or a bias that the type has no field for.
    """
    held = {name for name, slot in names.slots.items() if slot.path in trained}
    for name in held:
        if names.slots[name].weight.kind == "experts":
            raise PeftError(
                f"{names.slots[name].path!r} is trained as it is, and PEFT's format has no form for a part "
                "of a module of experts: give it factors (pj.lora), leave it out, or merge"
            )
    # PEFT wraps a module whole, and reads all of its tensors; other parameters go by their own name.
    saved = {
        module_of(name)
        for name in held
        if not name.endswith(".bias") and module_of(name) not in modules and names.is_leaf(module_of(name))
    }
    # It takes every module whose name has such an end; one that would take others too goes by name.
    known = {module_of(name) for name in names.slots}
    saved = {module for module in saved if not any(m != module and m.endswith(module) for m in known)}
    ends = TASK_MODULES.get(task or "", ())
    saved |= {module for name in names.slots for module in _owners(name) if ends and module.endswith(ends)}
    whole = {name for name in names.slots if saved & set(_owners(name))}
    # PEFT keeps tied modules together by the name of the embedding alone: each gets its own tensors.
    shared = {
        module_of(name) for name in names.tied if names.tied[name].path in trained & names.tied_weights()
    }
    saved |= shared
    biases = {name for name in names.slots if name.endswith(".bias")}
    own = {f"{module}.bias" for module in modules} & biases
    bias = "none"
    if held >= biases and biases - whole:
        bias = "all"
    elif own and held >= own:
        bias = of_adapted
    if of_adapted is None and (alone := sorted(held & biases - whole)):
        raise PeftError(
            f"{names.slots[alone[0]].path!r} is a bias trained as it is, for which PEFT has no field beside "
            "this adapter; leave it out, or train its whole module"
        )
    tensors = {}
    for name, slot in {**names.tied, **names.slots}.items():
        if name not in held | whole and module_of(name) not in shared:
            continue
        module = module_of(name)
        kept_name = f"{module}.base_layer.{name[len(module) + 1 :]}" if module in modules else name
        tensors[kept_name] = slot.view(np.asarray(dense(leaves[slot.path])))
    values = {
        **({} if of_adapted is None else {"bias": bias}),
        "modules_to_save": sorted(names.written(module) for module in saved) or None,
    }
    return values, tensors
