"""Our parameter paths <-> Hugging Face's tensor names, and the writing by that table.

A linear layer's `weight` [out, in] is our `kernel` [in, out]; a layer's tensors are rows of our
stacked leaf [L, ...].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from flax.traverse_util import flatten_dict

from peftjax.core.errors import PeftError

# What the module with a `weight` is at Hugging Face, where that decides the form of an adapter; 'tied' is
# an output layer that shares an embedding's table, and so has its inputs and outputs exchanged. A tensor of
# 'experts' [E, out, in] is what `Family.gathered` makes of those of a file; a 'parameter' [out, in] lies in a
# module that is no linear layer.
Kind = Literal["linear", "embedding", "convolution", "tied", "experts", "parameter"]


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """One parameter.

    Attributes:
        path: ours, such as `blocks/attention/query/kernel`.
        name: Hugging Face's, with `{layer}` where the layer's number stands.
        transpose: whether the two axes are swapped, of experts the last two; of a convolution, whether ours
            is channel-last, [*window, in, out], where Hugging Face has [out, in, *window].
        kind: what Hugging Face's module is.
        groups: of a convolution.
        leading: axes of length one that Hugging Face's tensor has before ours.
    """

    path: str
    name: str
    transpose: bool = False
    kind: Kind = "linear"
    groups: int = 1
    leading: int = 0

    def axes(self, ndim: int) -> tuple[int, ...]:
        """Our axes in the order of Hugging Face's, of a tensor with `ndim` beside the leading ones."""
        if not self.transpose:
            return tuple(range(ndim))
        if self.kind == "convolution":
            return (ndim - 1, ndim - 2, *range(ndim - 2))
        if self.kind == "experts":
            return (*range(ndim - 2), ndim - 1, ndim - 2)
        return tuple(reversed(range(ndim)))


def linear(path: str, name: str) -> tuple[TensorEntry, TensorEntry]:
    """The kernel and bias of a linear layer."""
    return (
        TensorEntry(f"{path}/kernel", f"{name}.weight", transpose=True),
        TensorEntry(f"{path}/bias", f"{name}.bias"),
    )


def conv1d(path: str, name: str) -> tuple[TensorEntry, TensorEntry]:
    """The kernel and bias of Hugging Face's `Conv1D`, a linear layer stored [in, out]."""
    return TensorEntry(f"{path}/kernel", f"{name}.weight"), TensorEntry(f"{path}/bias", f"{name}.bias")


def norm(path: str, name: str) -> tuple[TensorEntry, TensorEntry]:
    """The scale and bias of a layer norm."""
    return TensorEntry(f"{path}/scale", f"{name}.weight"), TensorEntry(f"{path}/bias", f"{name}.bias")


def embedding(path: str, name: str) -> TensorEntry:
    """An embedding table."""
    return TensorEntry(f"{path}/embedding", f"{name}.weight", kind="embedding")


def convolution(path: str, name: str, groups: int = 1) -> tuple[TensorEntry, TensorEntry]:
    """The kernel [*window, in, out] and bias of a convolution."""
    return (
        TensorEntry(f"{path}/kernel", f"{name}.weight", transpose=True, kind="convolution", groups=groups),
        TensorEntry(f"{path}/bias", f"{name}.bias"),
    )


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where one Hugging Face tensor lies: a row of our leaf, or all of it."""

    weight: TensorEntry
    layer: int | None

    @property
    def path(self) -> str:
        """The leaf's path."""
        return self.weight.path

    def shape(self, leaf: tuple[int, ...]) -> tuple[int, ...]:
        """The tensor's shape, from our leaf's."""
        part = leaf if self.layer is None else leaf[1:]
        own = (part[axis] for axis in self.weight.axes(len(part)))
        return (*(1,) * self.weight.leading, *own)

    def view(self, leaf: np.ndarray) -> np.ndarray:
        """The part of our leaf that holds the tensor, in Hugging Face's orientation."""
        part = leaf if self.layer is None else leaf[self.layer, ...]
        return part.transpose(self.weight.axes(part.ndim))[(None,) * self.weight.leading]


def to_hf(params: Mapping[str, Any], weights: tuple[TensorEntry, ...]) -> dict[str, np.ndarray]:
    """Hugging Face's tensors of `params` as numpy views: layers unstacked, kernels transposed.

    Raises:
        PeftError: for a parameter that is not in the table.
    """
    leaves = {path: np.asarray(leaf) for path, leaf in flatten_dict(params, sep="/").items()}
    slots = slots_of({path: leaf.shape for path, leaf in leaves.items()}, weights)
    return {name: slot.view(leaves[slot.path]) for name, slot in slots.items()}


def slots_of(shapes: Mapping[str, tuple[int, ...]], weights: Sequence[TensorEntry]) -> dict[str, Slot]:
    """Where each Hugging Face tensor of the parameters `shapes` lies in them.

    Raises:
        PeftError: for a parameter that is not in the table.
    """
    table = {weight.path: weight for weight in weights}
    slots = {}
    for path, shape in shapes.items():
        if path not in table:
            raise PeftError(f"parameter {path} {list(shape)} has no Hugging Face name")
        weight = table[path]
        layers = range(shape[0]) if "{layer}" in weight.name else (None,)
        for layer in layers:
            slots[weight.name.format(layer=layer)] = Slot(weight, layer)
    return slots
