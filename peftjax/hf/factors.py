"""The factors of one module: ours `a [r, in]`, `b [r, out]`, and PEFT's tensors for each kind of layer.

    linear         lora_A.weight [r, in]             lora_B.weight [out, r]
    embedding      lora_embedding_A [r, rows]        lora_embedding_B [dim, r]
    convolution    lora_A.weight [r, in, *window]    lora_B.weight [out, r, 1, ...]

An output layer tied to an embedding is linear, with inputs and outputs exchanged. PEFT's adapter of a
convolution with groups reads all channels at once: ours, which stays inside its group, is there a
block-diagonal A of rank groups·r.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from peftjax.core.errors import PeftError
from peftjax.models.weight_map import TensorEntry
from peftjax.weights.layout import Layout

MAGNITUDE = "lora_magnitude_vector"
A_NAMES = {"embedding": "lora_embedding_A"}
B_NAMES = {"embedding": "lora_embedding_B"}


@dataclass(frozen=True)
class Module:
    """One adapted module of a file, or one of its parameters."""

    rank: int
    alpha: float
    tensors: Mapping[str, np.ndarray]


def factor_names(weight: TensorEntry) -> tuple[str, str]:
    """What PEFT calls the two factors of a module."""
    return A_NAMES.get(weight.kind, "lora_A.weight"), B_NAMES.get(weight.kind, "lora_B.weight")


def rank_in_file(weight: TensorEntry, rank: int) -> int:
    """The rank that the file's tensors have."""
    return rank * weight.groups


def to_file(weight: TensorEntry, layout: Layout, a: np.ndarray, b: np.ndarray) -> dict[str, np.ndarray]:
    """PEFT's tensors of the factors `a [r, in]` and `b [r, out]`."""
    if weight.kind == "convolution":
        a, b = _to_convolution(weight, layout, a, b)
    elif weight.kind == "tied":
        a, b = b, a.T
    else:
        b = b.T
    return dict(zip(factor_names(weight), (a, b)))


def from_file(
    weight: TensorEntry, layout: Layout, tensors: Mapping[str, np.ndarray], rank: int, module: str
) -> tuple[np.ndarray, np.ndarray]:
    """The factors `a [r, in]` and `b [r, out]` of PEFT's tensors.

    Raises:
        PeftError: a tensor has not the shape that the rank and the parameter give it, or mixes the
            groups of a convolution.
    """
    names = factor_names(weight)
    (n, m), groups = layout.matrix, weight.groups
    if weight.kind == "convolution":
        channels, *window = _input_sizes(weight, layout)
        wanted = ((rank, groups * channels, *window), (m, rank // groups, *(1 for _ in window)))
    elif weight.kind == "tied":
        wanted = ((rank, m), (n, rank))
    else:
        wanted = ((rank, n), (m, rank))
    found = [tensors[name] for name in names]
    for name, tensor, shape in zip(names, found, wanted):
        if tensor.shape != shape:
            raise PeftError(
                f"tensor {f'{module}.{name}'!r} has shape {list(tensor.shape)}; rank {rank} on "
                f"{weight.path!r} needs {list(shape)}"
            )
    a, b = found
    if weight.kind == "convolution":
        return _from_convolution(weight, a, b, module)
    return (b.T, a) if weight.kind == "tied" else (a, b.T)


def magnitude_shape(weight: TensorEntry, layout: Layout) -> tuple[int, ...]:
    """The shape of DoRA's magnitudes [out] in the file."""
    out = layout.matrix[1]
    if weight.kind == "convolution":
        return (1, out, *(1 for _ in _input_sizes(weight, layout)[1:]))
    return (out,)


def _input_sizes(weight: TensorEntry, layout: Layout) -> tuple[int, ...]:
    """The channels of one group, then the window."""
    sizes = layout.sizes("i")
    return (sizes[-1], *sizes[:-1]) if weight.transpose else sizes


def _to_convolution(
    weight: TensorEntry, layout: Layout, a: np.ndarray, b: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    a = a.reshape(len(a), *layout.sizes("i"))
    if weight.transpose:
        a = np.moveaxis(a, -1, 1)
    if weight.groups > 1:
        (rank, channels, *window), groups = a.shape, weight.groups
        blocks = np.zeros((groups, rank, groups, channels, *window), a.dtype)
        for group in range(groups):
            blocks[group, :, group] = a
        a = blocks.reshape(groups * rank, groups * channels, *window)
    b = b.T
    return a, b.reshape(*b.shape, *(1 for _ in a.shape[2:]))


def _from_convolution(
    weight: TensorEntry, a: np.ndarray, b: np.ndarray, module: str
) -> tuple[np.ndarray, np.ndarray]:
    if weight.groups > 1:
        groups = weight.groups
        blocks = a.reshape(groups, len(a) // groups, groups, a.shape[1] // groups, *a.shape[2:])
        a = blocks[0, :, 0]
        for row in range(groups):
            for column in range(groups):
                if not np.array_equal(blocks[row, :, column], a if row == column else np.zeros_like(a)):
                    raise PeftError(
                        f"{module!r} is a convolution with groups whose adapter mixes them: it is no change "
                        "of the kernel, and cannot be read"
                    )
    if weight.transpose:
        a = np.moveaxis(a, 1, -1)
    return a.reshape(len(a), -1), b.reshape(*b.shape[:2]).T
