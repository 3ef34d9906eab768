"""Reading the parameters that a PEFT file holds as they are: saved modules, biases, shifts of biases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from peftjax.core.errors import PeftError
from peftjax.hf.common import OUTPUT_LAYER, TIED_EMBEDDING, CommonConfig
from peftjax.hf.names import Names, module_of
from peftjax.hf.tensors import Tensors
from peftjax.models.resize import VOCABULARY_AXES
from peftjax.models.weight_map import Slot
from peftjax.weights.base import Weight


def read_plain(
    config: CommonConfig, file: Tensors, names: Names, leaves: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """The parameters that the file trains as they are; layers it lacks are at the base's values.

    A `lora_B.bias` becomes its part of the module's own bias: `bias + scale · lora_B.bias`.

    Raises:
        PeftError: a tensor has no place, another shape, or is missing; a parameter that several modules share
            is changed for one of them.
    """
    values: dict[str, np.ndarray] = {}
    known = {names.canonical(name): name for name in file.plain}
    _require_complete(config, file, names, set(known))
    _require_ties(config, file, names, known)
    for name in sorted(known, key=lambda name: name in names.slots):  # a tied name, then its owner
        _, slot = names.place(known[name])
        view = _view(values, slot, leaves)
        tensor = file.plain[known[name]]
        if tensor.shape != view.shape:
            raise PeftError(
                f"tensor {known[name]!r} has shape {list(tensor.shape)}; {slot.path!r} needs "
                f"{list(view.shape)}{_resizing(slot.path, tensor)}"
            )
        view[...] = tensor
    for module, tensors in file.factors.items():
        if (shift := tensors.get("lora_B.bias")) is None:
            continue
        name = names.canonical(f"{module}.bias")
        if name not in names.slots:
            continue  # it becomes a bias of the adapter's own
        view = _view(values, names.slots[name], leaves)
        if shift.shape != view.shape:
            raise PeftError(
                f"tensor '{module}.lora_B.bias' has shape {list(shift.shape)}, not {list(view.shape)}"
            )
        view[...] += (config.scale_of(module) * shift).astype(view.dtype)
    return values


def _resizing(path: str, tensor: np.ndarray) -> str:
    """What to do about a vocabulary of another size."""
    if path not in VOCABULARY_AXES:
        return ""
    return (
        f"; the adapter's vocabulary was resized: load the model with vocab_size={len(tensor)} (--vocab-size)"
    )


def untrained_tables(config: CommonConfig, file: Tensors, names: Names) -> set[str]:
    """The parameters that the file holds and PEFT did not train: with `save_embedding_layers`, tables."""
    stored, trained = set(), set()
    for name in file.plain:
        known, slot = names.place(name)
        module = module_of(known)
        table = slot.weight.kind in ("embedding", "tied") or module.rpartition(".")[2] == OUTPUT_LAYER
        saved = any(f".{part}." in f".{module}." for part in config.modules_to_save)
        if table and name.endswith(".weight") and not saved:
            stored.add(slot.path)
        else:
            trained.add(slot.path)
    return stored - trained


def _view(values: dict[str, np.ndarray], slot: Slot, leaves: Mapping[str, Any]) -> np.ndarray:
    leaf = leaves[slot.path]
    if isinstance(leaf, Weight):
        raise PeftError(
            f"the adapter replaces {slot.path!r}, which is a {type(leaf).__name__} here; import it on the "
            "plain base"
        )
    values.setdefault(slot.path, np.array(leaf))
    return slot.view(values[slot.path])


def _require_complete(config: CommonConfig, file: Tensors, names: Names, held: set[str]) -> None:
    for name in _expected(config, file, names):
        if name not in held and not file.leaves_out(names.written(name)):
            raise PeftError(
                f"tensor {names.written(name)!r} is missing in the file: modules_to_save="
                f"{list(config.modules_to_save)} and bias={config.bias!r} ask for it"
            )


def _expected(config: CommonConfig, file: Tensors, names: Names) -> Iterator[str]:
    """The tensors of saved modules and, as `bias` says, of biases."""
    adapted = {names.canonical(f"{module}.weight") for module in file.factors}
    for name in names.slots:
        module = module_of(name)
        saved = bool(config.modules_to_save) and f".{module}".endswith(
            tuple(f".{part}" for part in config.modules_to_save)
        )
        bias = name.endswith(".bias") and (
            config.bias == "all" or (config.bias_of_adapted and f"{module}.weight" in adapted)
        )
        if saved or bias:
            yield name


def _require_ties(config: CommonConfig, file: Tensors, names: Names, known: Mapping[str, str]) -> None:
    """Raise a PeftError where a shared weight is exchanged in one of its modules alone."""
    for path in sorted(names.tied_weights()):
        weights = [name for name in names.sharing(path) if name.endswith(".weight")]
        given = [file.plain[known[name]] for name in weights if name in known]
        equal = len(given) == len(weights) and all(np.array_equal(given[0], other) for other in given[1:])
        together = config.tied and names.kept_together(path) and weights[0] in known and len(given) == 1
        if not given or equal or together:
            continue
        modules = " and of ".join(repr(names.written(module_of(name))) for name in weights)
        how = "gives each another" if len(given) == len(weights) else f"exchanges {len(given)} of them"
        raise PeftError(
            f"{path!r} is the weight of {modules} in this model, and the adapter {how}: "
            f"{names.untying(path)}leave it out, or train without it (PEFT keeps two together where the "
            f"embedding is called {TIED_EMBEDDING!r} and ensure_weight_tying is True)"
        )
