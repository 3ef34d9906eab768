"""Reading the factors of a PEFT file: those of each parameter, one adapter a layer of its stack."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peftjax.core import tree
from peftjax.core.errors import PeftError
from peftjax.hf.common import TIED_EMBEDDING
from peftjax.hf.config import LoraConfig
from peftjax.hf.experts import read_experts
from peftjax.hf.factors import MAGNITUDE, factor_names, from_file, magnitude_shape
from peftjax.hf.names import Names, module_of, require_one_stack
from peftjax.hf.tensors import PREFIX, Tensors
from peftjax.methods.lowrank.lora import SHIFT
from peftjax.models.weight_map import Slot
from peftjax.weights.layout import Layout, layout_of


@dataclass(frozen=True)
class Layer:
    """The adapter of one module, at its own rank and scale: `a [r, in]`, `b [r, out]`, float32.

    Of experts they are `[E, r, in]` and `[E, r, out]`.
    """

    a: np.ndarray
    b: np.ndarray
    scale: float
    magnitude: np.ndarray | None
    shift: np.ndarray | None = None
    """The bias that the file gives a layer which has none."""

    @property
    def rank(self) -> int:
        """Its own rank."""
        return self.a.shape[-2]


@dataclass(frozen=True)
class Adapted:
    """The adapters of one parameter, by layer; of all its layers, or of those that the file has."""

    layout: Layout
    layers: Mapping[int | None, Layer]

    @property
    def rank(self) -> int:
        """The largest rank of a layer."""
        return max(layer.rank for layer in self.layers.values())

    @property
    def scale(self) -> float:
        """The scale of the first layer of the largest rank, which the others take on."""
        return next(layer.scale for layer in self.layers.values() if layer.rank == self.rank)

    def filled(self, slots: Mapping[str, jax.Array], chosen: list[int] | None) -> dict[str, jax.Array]:
        """The trainable of this parameter: `slots`, as `init` gave it, with the file's numbers.

        Ranks are padded with zeros, scales folded into `b`; a layer without an adapter gets zeros,
        and keeps the magnitudes of `init`. `chosen` are the layers that the method adapts.
        """
        values = {name: np.array(slot) for name, slot in slots.items()}
        values["a"][...] = 0.0
        values["b"][...] = 0.0
        if SHIFT in values:
            values[SHIFT][...] = 0.0
        for number, layer in self.layers.items():
            row = ... if number is None else chosen.index(number) if chosen is not None else number
            rank, factor = layer.rank, layer.scale / self.scale
            values["a"][row][..., :rank, :] = layer.a
            values["b"][row][..., :rank, :] = layer.b if factor == 1.0 else layer.b * np.float64(factor)
            if layer.magnitude is not None:
                values["magnitude"][row] = layer.magnitude
            if layer.shift is not None:
                values[SHIFT][row] = layer.shift
        return {name: jnp.asarray(value, slots[name].dtype) for name, value in values.items()}


def read_adapted(
    config: LoraConfig,
    file: Tensors,
    names: Names,
    leaves: Mapping[str, Any],
    layouts: Mapping[str, str] | None,
) -> dict[str, Adapted]:
    """The adapters of every parameter, in tree order.

    Raises:
        PeftError: a tensor has no place, another shape, or is missing; a module that the configuration
            asks for has no adapter; an embedding and the output layer tied to it have different ones.
    """
    found: dict[str, dict[int | None, Layer]] = {}
    tied: dict[str, dict[str, Layer]] = {}
    shapes: dict[str, Layout] = {}
    known = set()
    of_experts, modules = read_experts(
        config, file, names, {path: leaf.shape for path, leaf in leaves.items()}
    )
    for slot, (a, b), scale in of_experts:
        shapes.setdefault(slot.path, layout_of(slot.path, leaves, layouts))
        found.setdefault(slot.path, {})[slot.layer] = Layer(a, b, scale, None)
    for module, tensors in file.factors.items():
        if module in modules:
            continue
        name, slot = names.place(f"{module}.weight")
        layout = shapes.setdefault(slot.path, layout_of(slot.path, leaves, layouts))
        require_one_stack(slot, name, layout)
        layer = _layer(config, f"{PREFIX}{module}", config.rank_of(module), slot, layout, tensors)
        scale = config.scale_of(module)
        own_bias = names.canonical(f"{module}.bias") in names.slots
        bias = f"{tree.module_of(slot.path)}/bias"
        if not own_bias and "lora_B.bias" in tensors and bias in leaves:
            raise PeftError(
                f"{module!r} has a lora_B.bias, and the table names no bias of its own to add it to, {bias!r}"
            )
        shift = None if own_bias else _shift(scale, f"{PREFIX}{module}", slot, layout, tensors)
        scaled = Layer(*layer[:2], scale, layer[2], shift)
        known.add(name)
        if name in names.slots:
            found.setdefault(slot.path, {})[slot.layer] = scaled
        else:
            tied.setdefault(slot.path, {})[name] = scaled
    for path in names.tied_weights() & (found.keys() | tied.keys()):
        own, others = found.get(path, {}).get(None), tied.get(path, {})
        weights = [name for name in names.sharing(path) if name.endswith(".weight")]
        if not all(_same(own, others.get(name)) for name in weights[1:]):
            modules = ", ".join(repr(names.written(module_of(name))) for name in weights)
            raise PeftError(
                f"{path!r} is the weight of several modules of this model ({modules}), and the adapter "
                f"changes them apart: {names.untying(path)}leave it out, or train without it (PEFT keeps two "
                f"together where the embedding is called {TIED_EMBEDDING!r}, both are target_modules and "
                "ensure_weight_tying is True)"
            )
    require_targets(config, file, names, leaves, known)
    require_bases(file, names, leaves)
    return {
        path: Adapted(shapes[path], dict(sorted(found[path].items(), key=lambda item: item[0] or 0)))
        for path in leaves
        if path in found
    }


def _layer(
    config: LoraConfig,
    module: str,
    rank: int,
    slot: Slot,
    layout: Layout,
    tensors: Mapping[str, np.ndarray],
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    weight = slot.weight
    if config.by_parameter(module.removeprefix(PREFIX)):
        # A parameter of two axes is a linear weight to PEFT, whatever its module makes of it.
        inputs_first = (layout.letters.replace("s", "") == "io") != weight.transpose
        weight = replace(weight, kind="tied" if inputs_first else "linear")
    wanted = [*factor_names(weight), *([MAGNITUDE] if config.dora else [])]
    for name in wanted:
        if name not in tensors:
            raise PeftError(f"tensor {f'{module}.{name}'!r} is missing")
    if extra := sorted(tensors.keys() - {*wanted, "lora_B.bias"}):
        without = "" if config.dora else " without use_dora"
        raise PeftError(
            f"tensor {f'{module}.{extra[0]}'!r} does not go with the {weight.kind} weight "
            f"{slot.path!r}{without}"
        )
    a, b = from_file(weight, layout, tensors, rank, module)
    a, b = _at_most(a.astype(np.float32), b.astype(np.float32), min(layout.matrix))
    if not config.dora:
        return a, b, None
    magnitude, shape = tensors[MAGNITUDE], magnitude_shape(slot.weight, layout)
    if magnitude.size != layout.matrix[1]:
        raise PeftError(
            f"tensor {f'{module}.{MAGNITUDE}'!r} has shape {list(magnitude.shape)}; {slot.path!r} needs "
            f"{list(shape)}"
        )
    return a, b, magnitude.astype(np.float32).reshape(-1)


def _shift(
    scale: float, module: str, slot: Slot, layout: Layout, tensors: Mapping[str, np.ndarray]
) -> np.ndarray | None:
    """What a `lora_B.bias` adds to the layer."""
    if (bias := tensors.get("lora_B.bias")) is None:
        return None
    if bias.shape != (layout.matrix[1],) or slot.weight.kind not in ("linear", "convolution"):
        raise PeftError(
            f"tensor '{module}.lora_B.bias' has shape {list(bias.shape)}; {slot.path!r}, a "
            f"{slot.weight.kind} weight with {layout.matrix[1]} outputs, has no place for it"
        )
    return (scale * bias).astype(np.float32)


def _at_most(a: np.ndarray, b: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Factors of the same product `aᵀb` whose rank is no larger than the matrix."""
    if len(a) <= rank:
        return a, b
    product = (a.astype(np.float64).T @ b.astype(np.float64)).astype(np.float32)
    unit = np.eye(rank, dtype=np.float32)
    return (product.T, unit) if b.shape[1] == rank else (unit, product)


def _same(first: Layer | None, second: Layer | None) -> bool:
    return (
        first is not None
        and second is not None
        and np.array_equal(first.a, second.a)
        and np.array_equal(first.b, second.b)
        and first.scale == second.scale
        and first.magnitude is None
    )


def require_targets(
    config: LoraConfig, file: Tensors, names: Names, leaves: Mapping[str, Any], adapted: set[str]
) -> None:
    """Raise a PeftError when the configuration asks for a module whose factors are not in the file."""
    bare = any(names.canonical(module) == f"{names.prefix}{module}" for module in file.factors)
    for name, slot in names.slots.items():
        module, _, parameter = name.rpartition(".")
        matrix = leaves[slot.path].ndim - (slot.layer is not None) >= 2
        # PEFT decides by the module's class what 'all-linear' means for a head; in a backbone it is all.
        linear = slot.weight.kind == "linear" and names.prefix != "" and module.startswith(names.prefix)
        spelt = module.removeprefix(names.prefix) if bare else module
        by_parameter = config.by_parameter(spelt)
        every = config.target_modules == "all-linear"
        if parameter != "weight" or not matrix or (every and not linear and not by_parameter):
            continue
        if name in adapted or file.leaves_out(spelt):
            continue
        for asked, field in ((config.targets(spelt), "target_modules"), (by_parameter, "target_parameters")):
            if asked:
                raise PeftError(f"{field} asks for {spelt!r}, whose factors are missing in the file")


def require_bases(file: Tensors, names: Names, leaves: Mapping[str, Any]) -> None:
    """Raise a PeftError when a weight that PEFT saved beside its adapter is not this model's."""
    for name, tensor in file.bases.items():
        _, slot = names.place(name)
        base = slot.view(np.asarray(leaves[slot.path]))
        if base.shape != tensor.shape or not np.array_equal(base.astype(tensor.dtype), tensor):
            raise PeftError(
                f"the adapter holds its own weight for {name!r}, {list(tensor.shape)}, and this model's is "
                f"another, {list(base.shape)}; load the model that the adapter was trained on, its "
                "vocabulary resized where that was"
            )
