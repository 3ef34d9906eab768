"""The tensors of a PEFT file, sorted: factors by module, and parameters saved as they are."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from peftjax.core.errors import PeftError
from peftjax.core.tree import nearest
from peftjax.hf.common import TENSORS
from peftjax.io.safetensors import find_tensors, read_tensors

PREFIX = "base_model.model."
TOKENS = "token_adapter.trainable_tokens_delta"
OF_LORA = (
    "lora_A.weight",
    "lora_B.weight",
    "lora_B.bias",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
)
OF_MODEL = "base_model."
"""Before the names of arrays that belong to the adapter as a whole."""
# In a state dict that was saved by hand the adapter's name stands in the keys, as in `lora_A.default.weight`.
_NAMED = re.compile(
    r"(.+\.(?:lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|modules_to_save"
    r"|trainable_tokens_delta))\.([^.]+?)(\.weight|\.bias)?"
)


@dataclass(frozen=True)
class Tensors:
    """What a file holds, by the module names of the class that PEFT wrapped.

    Attributes:
        factors: the adapter's tensors of each module.
        plain: parameters, trained as they are.
        bases: weights that PEFT saved beside the adapters of their own module.
        tokens: trained rows of each table.
        shared: the adapter's tensors of the model as a whole.
        left_out: the modules and tensors that the caller asked not to read.
    """

    factors: Mapping[str, Mapping[str, np.ndarray]]
    plain: Mapping[str, np.ndarray]
    bases: Mapping[str, np.ndarray]
    tokens: Mapping[str, np.ndarray] = field(default_factory=dict)
    shared: Mapping[str, np.ndarray] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    def leaves_out(self, name: str) -> bool:
        """Whether the caller asked not to read a module or a tensor."""
        return any(name == part or name.startswith(f"{part}.") for part in self.left_out)


def read_file(
    folder: Path,
    leave_out: Sequence[str] = (),
    *,
    own: Sequence[str] = OF_LORA,
    shared: Sequence[str] = (),
) -> Tensors:
    """The tensors of `adapter_model.safetensors`.

    Args:
        folder: the adapter's.
        leave_out: modules or tensors that are not read.
        own: what the tensors of an adapted module are called, with '{row}' for any number.
        shared: the same of those of the model as a whole, and with '{group}' for any name.

    Raises:
        PeftError: the file is missing or damaged; a tensor is of no known kind; a name to leave out is
            not there.
    """
    file = folder / TENSORS
    if not file.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        found = (
            "only a pickled adapter_model.bin; save it again from PEFT as safetensors" if pickled else "none"
        )
        raise PeftError(f"{folder} needs {TENSORS} and has {found}")
    places = find_tensors(file)
    together = re.compile("|".join(map(_any, shared)))
    of_model = {
        name.removeprefix(OF_MODEL): name
        for name in places
        if shared and name.startswith(OF_MODEL) and together.fullmatch(name.removeprefix(OF_MODEL))
    }
    names = {name: place for name, place in places.items() if name not in of_model.values()}
    for name in names:
        if not name.startswith(PREFIX):
            raise PeftError(f"{file}: tensor {name!r} does not begin with {PREFIX!r}, as an adapter's do")
    left = _without_adapter_name(file, {name.removeprefix(PREFIX): name for name in names})
    for part in leave_out:
        hits = [name for name in left if name.startswith(f"{part}.") or name == part]
        if not hits:
            raise PeftError(f"{file}: nothing of {part!r} to leave out; closest: {nearest(part, left)}")
        for name in hits:
            del left[name]
    held = dict(read_tensors({name: names[name] for name in left.values()}))
    of_module = re.compile(rf"(.+)\.({'|'.join(map(_any, own))})")
    factors: dict[str, dict[str, np.ndarray]] = {}
    plain, bases, tokens = {}, {}, {}
    for name, full in left.items():
        tensor = held[full]
        if name.endswith(f".{TOKENS}"):
            tokens[name.removesuffix(f".{TOKENS}")] = tensor
        elif match := re.fullmatch(r"(.+)\.token_adapter\.base_layer\.(\w+)", name):
            # A table that was saved beside its rows, as those are that `save_embedding_layers` stores.
            plain[f"{match[1]}.{match[2]}"] = tensor
        elif shared and any(name.endswith(f".{of_all}") for of_all in shared):
            continue  # a copy beside each module of what the whole model has
        elif match := of_module.fullmatch(name):
            factors.setdefault(match[1], {})[match[2]] = tensor
        elif ".lora_" in name or "token_adapter" in name:
            raise PeftError(f"{file}: tensor {name!r} belongs to a variant of LoRA that peftjax has not")
        elif match := re.fullmatch(r"(.+)\.base_layer\.(\w+)", name):
            (plain if match[2] == "bias" else bases)[f"{match[1]}.{match[2]}"] = tensor
        elif match := re.fullmatch(r"(.+)\.(modules_to_save|original_module)\.(\w+)", name):
            # With bias="all" PEFT writes the biases of a saved module twice more; it reads this one.
            if f"{match[1]}.{match[3]}" not in left:
                raise PeftError(f"{file}: tensor {name!r} has no {match[1]}.{match[3]} beside it")
        else:
            plain[name] = tensor
    if not factors and not tokens:
        raise PeftError(f"{file} holds no tensors of adapted modules, such as {own[0]!r}")
    found = dict(read_tensors({full: places[full] for full in of_model.values()}))
    whole = {name: found[full] for name, full in of_model.items()}
    return Tensors(factors, plain, bases, tokens, whole, tuple(leave_out))


def _any(name: str) -> str:
    """The pattern of a name with any number and any group."""
    return re.escape(name).replace(r"\{row\}", r"\d+").replace(r"\{group\}", r"[^.]+")


def _without_adapter_name(file: Path, names: Mapping[str, str]) -> dict[str, str]:
    """The tensors by the names that `save_pretrained` gives them, which lack the adapter's name.

    Raises:
        PeftError: there are several adapters in the file, or a tensor with the adapter's name and without.
    """
    adapters = {
        match[2] for name in names if (match := _NAMED.fullmatch(name)) and match[2] not in ("weight", "bias")
    }
    if not adapters:
        return dict(names)
    if len(adapters) > 1:
        raise PeftError(
            f"{file} holds several adapters, {', '.join(map(repr, sorted(adapters)))}; save each by itself"
        )
    plain: dict[str, str] = {}
    for name, full in names.items():
        match = _NAMED.fullmatch(name)
        short = name
        if match is not None and match[2] in adapters:
            # DoRA's magnitudes and embeddings' factors are saved without a '.weight'.
            tail = "" if match[1].endswith("lora_magnitude_vector") else match[3] or ""
            short = match[1].removesuffix(".modules_to_save") + tail
        elif ".original_module." in name:
            continue
        if short in plain:
            raise PeftError(f"{file} holds both {plain[short]!r} and {full!r}")
        plain[short] = full
    return plain
