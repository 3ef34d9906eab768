"""A trained adapter as a folder that Hugging Face's PEFT loads."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from peftjax.adapters.rounding import rounded
from peftjax.core import tree
from peftjax.core.errors import PeftError
from peftjax.hf.config import FIELDS, OF_ALL_VERSIONS, clean, rank_power
from peftjax.hf.experts import expert_modules
from peftjax.hf.factors import MAGNITUDE, Module, magnitude_shape, rank_in_file, to_file
from peftjax.hf.folder import fan_in_fan_out, plain_parameters, task_of, write_folder
from peftjax.hf.forms.as_they_are import export_modules
from peftjax.hf.forms.write import export_form, form_written
from peftjax.hf.names import Model, Names, module_of, names_of, require_one_stack
from peftjax.hf.prefix import export_prefix
from peftjax.hf.replication import ranges_of
from peftjax.hf.tensors import PREFIX, TOKENS
from peftjax.hf.tokens import written_tokens
from peftjax.hf.trained import (
    Factors,
    changed_parameters,
    difference,
    is_rslora,
    lies_in,
    method_parts,
    on_residuals,
    require_named,
    trained_rows,
    without,
)
from peftjax.models.weight_map import Slot
from peftjax.transform.frozen import Frozen, Trainable
from peftjax.transform.registry import describe
from peftjax.transform.transform import Transform


def export_peft(
    path: str | os.PathLike[str],
    model: Model,
    method: Transform,
    frozen: Frozen,
    trainable: Trainable,
    *,
    base: str | None = None,
    initial: Trainable | None = None,
    also: Collection[str] = (),
    leave_out: Sequence[str] = (),
) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` for `PeftModel.from_pretrained`.

    LoRA, rsLoRA, LoRA+, LoRA-FA and DoRA are written as they are, one module a layer of a stack; rows
    of zeros in both factors are left out. PiSSA and OLoRA, whose base is a residual, become the LoRA of
    twice the rank on the original base: `s (aᵀb − a₀ᵀb₀)`. Parameters that `unfreeze` trains are
    `modules_to_save`, biases as PEFT writes them, `rows` of a table `trainable_token_indices`. Of a `prefix`
    the keys and values are written that its MLP gives; PEFT's means the same on decoders with rotary
    positions and no window. Factors of experts and routers are `target_parameters`, without dropout. The
    methods of `peftjax.hf.forms.table` are written as PEFT's own types, on linear layers.

    Args:
        path: the folder; made if absent. Both files are complete before either replaces what was there.
        model: the backbone, whose head says the Hugging Face class; or, for a model of your own, a
            table of `peftjax.models.weight_map` entries from parameter paths to module names.
        method: the method.
        frozen: its frozen part.
        trainable: the adapter.
        base: the name or folder of the base model, for `base_model_name_or_path`.
        initial: the trainable as `init` gave it; needed for PiSSA and OLoRA, and not used else.
        also: paths of further parameters to write as they are, such as those of a head that the base's
            checkpoint lacks.
        leave_out: paths, of parameters or modules, that are not to be written though they are trained.

    Raises:
        PeftError: nothing is adapted; a parameter of `also` is; something trained has no place in the
            Hugging Face class or in PEFT's format; `initial` is needed and missing; a path to leave out
            is not trained.
    """
    if method.name == "prefix":
        if also or leave_out:
            raise PeftError("export_peft: a prefix is written whole and alone, without also and leave_out")
        export_prefix(Path(path), model, method, trainable, base)
        return
    if (form := form_written(method)) is not None:
        (export_modules if form.as_they_are else export_form)(
            form,
            Path(path),
            model,
            method,
            frozen,
            trainable,
            base=base,
            also=list(also),
            leave_out=leave_out,
        )
        return
    frozen = replace(frozen, advanced=True)
    if initial is not None:
        initial = rounded(method, frozen, initial)[2]
    method, frozen, trainable = rounded(method, frozen, trainable)
    leaves = tree.named_leaves(method.apply(frozen, trainable))
    rows = trained_rows(frozen, leaves)
    factors, trained = changed_parameters(
        frozen, {name: leaf for name, leaf in leaves.items() if name not in rows}
    )
    for name in also:
        if name in factors and not lies_in(name, leave_out):
            raise PeftError(f"{name!r} has an adapter and is to be written as it is; train it instead")
    trained |= {*also}
    factors, trained, rows = without(leave_out, factors, trained, rows)
    names = names_of(model, leaves)
    require_named((*factors, *trained, *rows), names)
    if not factors:
        raise PeftError(
            f"{method.name}: no weight has low-rank factors, which every adapter in this format needs; "
            "merge it and save the model instead"
        )
    config = describe(method)
    if twofold := on_residuals(config, frozen.plan, trainable) & factors.keys():
        if initial is None:
            raise PeftError(
                f"{method.name} trains on a residual of the base; pass initial=, the trainable that init "
                "gave, to write it as LoRA on the base itself"
            )
        first, _ = changed_parameters(frozen, tree.named_leaves(method.apply(frozen, initial)))
        factors |= {name: difference(factors[name], first[name]) for name in twofold}
    dora = {name for name, own in factors.items() if own.magnitude is not None}
    if dora and len(dora) < len(factors):
        other = next(name for name in factors if name not in dora)
        raise PeftError(
            f"{method.name}: {min(dora)!r} has DoRA's magnitudes and {other!r} has none; PEFT's use_dora "
            "is for all modules, so export them as two adapters or merge one"
        )
    rslora = all(is_rslora(config, frozen.plan, trainable, name) for name in factors)
    modules, experts = _modules(names, factors, rslora), expert_modules(names, factors, rslora)
    if not modules and not experts:
        raise PeftError(f"{method.name}: every factor is zero, so there is no adapter to write")
    task = task_of(names, modules)
    values, plain = plain_parameters(names, leaves, trained, modules, task)
    tensors = {f"{PREFIX}{names.written(name)}": tensor for name, tensor in plain.items()} | {
        f"{PREFIX}{names.written(module)}.{name}": tensor
        for module, own in modules.items()
        for name, tensor in own.tensors.items()
    }
    tensors |= {
        f"{PREFIX}{names.written(place)}.{name}": tensor
        for place, own in experts.values()
        for name, tensor in own.tensors.items()
    }
    tokens = {names.written(module): own for module, own in written_tokens(rows, names).items()}
    tensors |= {f"{PREFIX}{module}.{TOKENS}": own.values for module, own in tokens.items()}
    written, by_parameter = _asked_for(names, modules)
    by_parameter |= {names.written(name): own for name, (_, own) in experts.items()}
    dropout = max((part.get("dropout", 0.0) for part in method_parts(config)), default=0.0)
    values |= _ranks(written | by_parameter) | {
        "base_model_name_or_path": base,
        "ensure_weight_tying": any(
            names.kept_together(path) for path in names.tied_weights() & (factors.keys() | trained)
        ),
        "fan_in_fan_out": fan_in_fan_out(names, {path: own.layout for path, own in factors.items()}, modules),
        "lora_bias": any(own.shift is not None for own in factors.values()),
        "lora_dropout": 0.0 if by_parameter else dropout,
        "target_modules": sorted(written),
        "target_parameters": sorted(by_parameter) or None,
        "task_type": task,
        "trainable_token_indices": {module: list(own.indices) for module, own in tokens.items()} or None,
        "use_dora": bool(dora),
        "use_rslora": rslora,
    }
    write_folder(Path(path), _told(values | ranges_of(config)), tensors)


def _told(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields to write: those that every version of PEFT knows, and those not at their default."""
    every = {**FIELDS, **values}
    return {name: every[name] for name in every if name in OF_ALL_VERSIONS or every[name] != FIELDS[name]}


def _asked_for(names: Names, modules: Mapping[str, Module]) -> tuple[dict[str, Module], dict[str, Module]]:
    """The modules by what the configuration asks for: the classes' modules, and parameters of modules."""
    written: dict[str, Module] = {}
    by_parameter: dict[str, Module] = {}
    for module, own in modules.items():
        weight = f"{module}.weight"
        if weight in names.slots and names.slots[weight].weight.kind == "parameter":
            by_parameter[names.written(weight)] = own
        else:
            written[names.written(module)] = own
    return written, by_parameter


def _modules(names: Names, factors: Mapping[str, Factors], rslora: bool) -> dict[str, Module]:
    """Every adapted module: a layer each of the stacks, without the layers that have only zeros."""
    modules = {}
    with_bias = any(own.shift is not None for own in factors.values())
    for name, slot in (*names.slots.items(), *names.tied.items()):
        own = factors.get(slot.path) if slot.weight.kind != "experts" else None
        if own is not None and (module := _module(name, slot, own, rslora, with_bias)) is not None:
            modules[module_of(name)] = module
    return modules


def _module(name: str, slot: Slot, own: Factors, rslora: bool, with_bias: bool) -> Module | None:
    require_one_stack(slot, name, own.layout)
    row = ... if slot.layer is None else slot.layer
    a, b = own.a[row], own.b[row]
    padded = len(a)
    filled = a.any(axis=-1) | b.any(axis=-1)
    magnitude = None if own.magnitude is None else own.magnitude[row]
    if magnitude is not None and slot.weight.kind == "tied":
        raise PeftError(
            f"{slot.path!r} has DoRA's magnitudes and is the output layer {name!r} too, whose lengths PEFT "
            "takes along the other axis; use LoRA there, or merge"
        )
    shift = None if own.shift is None else own.shift[row]
    if not filled.any():
        same = magnitude is None or np.array_equal(magnitude, own.untouched[row])
        if same and (shift is None or not shift.any()):
            return None
        filled[0] = True
    a, b = a[filled], b[filled]
    full, rank = rank_in_file(slot.weight, padded), rank_in_file(slot.weight, len(a))
    alpha = own.scale * rank_power(full, rslora)
    if rank != full:
        b = (b * np.float64(rank_power(rank, rslora) / rank_power(full, rslora))).astype(b.dtype)
    tensors = to_file(slot.weight, own.layout, a, b)
    if magnitude is not None:
        tensors[MAGNITUDE] = magnitude.reshape(magnitude_shape(slot.weight, own.layout))
    if with_bias:
        if magnitude is not None or slot.weight.kind not in ("linear", "convolution"):
            raise PeftError(
                f"{slot.path!r} is adapted beside layers that the adapter gives a bias (bias='added'), and "
                "PEFT's lora_bias goes neither with DoRA nor with embeddings: train them apart"
            )
        scale = alpha / rank_power(rank, rslora)
        shift = np.zeros(own.layout.matrix[1], np.float32) if shift is None else shift
        tensors["lora_B.bias"] = (shift / np.float64(scale)).astype(np.float32)
    return Module(rank, clean(alpha), tensors)


def _ranks(modules: Mapping[str, Module]) -> dict[str, Any]:
    """The commonest rank and alpha, and patterns for the modules that have others."""
    values: dict[str, Any] = {}
    for field, pattern, of in (
        ("r", "rank_pattern", {module: own.rank for module, own in modules.items()}),
        ("lora_alpha", "alpha_pattern", {module: own.alpha for module, own in modules.items()}),
    ):
        counts = Counter(of.values())
        values[field] = max(counts, key=lambda value: (counts[value], value))
        others = {module: value for module, value in of.items() if value != values[field]}
        values[pattern] = {f"^{re.escape(module)}": value for module, value in others.items()}
    return values
