"""Factors of experts: PEFT's are of a module's parameters (`target_parameters`), ours of gate, up and down.

    lora_A.weight [E r, in]     one expert behind another
    lora_B.weight [out, r E]    each number of the rank for all experts

`gate_up_proj` has the outputs of both. Of two parameters in one module, the first one's lie in `base_layer`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from peftjax.core.errors import PeftError
from peftjax.hf.config import LoraConfig, clean, rank_power
from peftjax.hf.factors import Module
from peftjax.hf.names import Names, module_of
from peftjax.hf.tensors import PREFIX, Tensors
from peftjax.hf.trained import Factors
from peftjax.models.weight_map import Slot

PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
INNER = ".base_layer"
Pair = tuple[np.ndarray, np.ndarray]
"""Factors `a [E, r, in]` and `b [E, r, out]`."""


def read_experts(
    config: LoraConfig, file: Tensors, names: Names, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[list[tuple[Slot, Pair, float]], set[str]]:
    """The factors of each layer of each kernel with their scale, and the modules of the file that they are.

    Args:
        config: of the adapter.
        file: its tensors.
        names: of the model.
        shapes: of its parameters, by path.

    Raises:
        PeftError: a tensor is missing or has another shape; the configuration does not tell whose factors
            they are, or asks for some that the file has not.
    """
    found: list[tuple[Slot, Pair, float]] = []
    modules, known = set(), set()
    for module, tensors in file.factors.items():
        owner = module.removesuffix(INNER)
        slots = _slots(names, names.canonical(f"{owner}.down_proj"))
        if slots is None:
            continue
        parameter = _parameter(config, file, module, owner)
        key = f"{owner}.{parameter}"
        own = [slots[part] for part in PARTS[parameter]]
        rank, scale = config.rank_of_key(key), config.scale_of_key(key)
        parts = _from_file(module, tensors, [shapes[slot.path] for slot in own], rank, names.interleaved)
        found += [(slot, part, scale) for slot, part in zip(own, parts)]
        modules.add(module)
        known.add(names.canonical(key))
    for owner in _owners(names):
        for parameter in PARTS:
            spelt = f"{names.written(owner)}.{parameter}"
            read = f"{owner}.{parameter}" in known or file.leaves_out(names.written(owner))
            if config.asks_for_parameter(spelt) and not read:
                raise PeftError(
                    f"target_parameters asks for {spelt!r}, whose factors are missing in the file"
                )
    return found, modules


def _owners(names: Names) -> list[str]:
    """The modules of experts, by the names of the table."""
    owners = (module_of(name) for name, slot in names.slots.items() if slot.weight.kind == "experts")
    return list(dict.fromkeys(owners))


def _slots(names: Names, down: str) -> dict[str, Slot] | None:
    """The kernels of the experts whose `down_proj` has this name; None where it is none."""
    slot = names.slots.get(down)
    if slot is None or slot.weight.kind != "experts":
        return None
    owner = module_of(down)
    return {part: names.slots[f"{owner}.{part}"] for parts in PARTS.values() for part in parts}


def _parameter(config: LoraConfig, file: Tensors, module: str, owner: str) -> str:
    if module != owner:
        return "gate_up_proj"
    if owner + INNER in file.factors:
        return "down_proj"
    asked = [name for name in PARTS if config.asks_for_parameter(f"{owner}.{name}")]
    if len(asked) != 1:
        raise PeftError(
            f"{module!r} has one pair of factors, and target_parameters asks for "
            f"{' and '.join(asked) or 'no parameter'} of it"
        )
    return asked[0]


def _from_file(
    module: str,
    tensors: Mapping[str, np.ndarray],
    shapes: Sequence[tuple[int, ...]],
    rank: int,
    interleaved: bool,
) -> list[Pair]:
    """The factors of each kernel [L, E, in, out] of a parameter."""
    *_, experts, inputs, outputs = shapes[0]
    wanted = {
        "lora_A.weight": (experts * rank, inputs),
        "lora_B.weight": (len(shapes) * outputs, rank * experts),
    }
    for name, shape in wanted.items():
        if name not in tensors:
            raise PeftError(f"tensor {f'{PREFIX}{module}.{name}'!r} is missing")
        if tensors[name].shape != shape:
            raise PeftError(
                f"tensor {f'{PREFIX}{module}.{name}'!r} has shape {list(tensors[name].shape)}; rank {rank} "
                f"on {experts} experts needs {list(shape)}"
            )
    if extra := sorted(tensors.keys() - wanted):
        raise PeftError(f"tensor {f'{PREFIX}{module}.{extra[0]}'!r} does not go with parameters of experts")
    if rank > min(inputs, outputs):
        raise PeftError(f"{module!r}: rank {rank} is larger than an expert's matrix, {inputs} x {outputs}")
    a, b = (tensors[name].astype(np.float32) for name in wanted)
    b = b.reshape(len(b), rank, experts).transpose(2, 1, 0)
    count = len(shapes)
    parts = [b[..., n::count] for n in range(count)] if interleaved else np.split(b, count, axis=-1)
    return [(a.reshape(experts, rank, inputs), part) for part in parts]


def expert_modules(
    names: Names, factors: Mapping[str, Factors], rslora: bool
) -> dict[str, tuple[str, Module]]:
    """By the parameter's name in the table: the module that its tensors are written under, and they.

    Gate and up with one `a` are one pair of factors; with two, one of both ranks.

    Raises:
        PeftError: there are DoRA's magnitudes, or biases of the adapter's own.
    """
    found: dict[str, tuple[str, Module]] = {}
    for owner in _owners(names):
        slots = _slots(names, f"{owner}.down_proj")
        assert slots is not None
        made = {}
        for parameter, parts in PARTS.items():
            own = [_of_layer(factors.get(slots[part].path), slots[part]) for part in parts]
            if (module := _module(own, rslora, names.interleaved)) is not None:
                made[parameter] = module
        for parameter, module in made.items():
            inner = INNER if parameter == "gate_up_proj" and len(made) > 1 else ""
            found[f"{owner}.{parameter}"] = owner + inner, module
    return found


def _of_layer(own: Factors | None, slot: Slot) -> tuple[np.ndarray, np.ndarray, float] | None:
    if own is None:
        return None
    if own.magnitude is not None or own.shift is not None:
        raise PeftError(
            f"{slot.path!r} has DoRA's magnitudes or a bias of the adapter's own, and PEFT has neither for "
            "parameters of experts: merge, or leave it out"
        )
    a, b = own.a[slot.layer], own.b[slot.layer]
    filled = (a.any(axis=-1) | b.any(axis=-1)).any(axis=0)
    return (a[:, filled], b[:, filled], own.scale) if filled.any() else None


def _module(
    parts: Sequence[tuple[np.ndarray, np.ndarray, float] | None], rslora: bool, interleaved: bool
) -> Module | None:
    """The tensors of a parameter, whose outputs are those of the parts."""
    given = [part for part in parts if part is not None]
    if not given:
        return None
    (first, b, scale), count = given[0], len(parts)
    one = all(np.array_equal(first, a) for a, _, _ in given)
    a = first if one else np.concatenate([a for a, _, _ in given], axis=1)
    (experts, rank, inputs), outputs = a.shape, b.shape[-1]
    joined, at = np.zeros((experts, rank, count, outputs), np.float32), 0
    for number, part in enumerate(parts):
        if part is None:
            continue
        rows = slice(None) if one else slice(at, at + part[0].shape[1])
        joined[:, rows, number] = part[1] * np.float64(part[2] / scale)
        at += part[0].shape[1]
    joined = joined.swapaxes(2, 3) if interleaved else joined
    tensors = {
        "lora_A.weight": a.reshape(experts * rank, inputs),
        "lora_B.weight": joined.reshape(experts, rank, -1).transpose(2, 1, 0).reshape(-1, rank * experts),
    }
    return Module(rank, clean(scale * rank_power(rank, rslora)), tensors)
