"""Experts' weights as files hold them, and as the tables of names have them: `[E, out, in]` for each layer.

A file has `gate` and `up` as one tensor, or a matrix for each expert.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from peftjax.core.errors import PeftError
from peftjax.io.safetensors import Tensor
from peftjax.models.quantized.scheme import CodedTensor, Scheme, Stored
from peftjax.models.weight_map import TensorEntry
from peftjax.quantize.groups import GroupCodes

LAYERS = ("gate", "up", "down")


def experts(path: str, name: str, *, bias: bool = False) -> tuple[TensorEntry, ...]:
    """The kernels of all experts, and their biases.

    Args:
        path: ours, such as `blocks/feed_forward/experts`.
        name: Hugging Face's, such as `model.layers.{layer}.mlp.experts`.
        bias: whether there are biases.
    """
    kernels = tuple(
        TensorEntry(f"{path}/{layer}/kernel", f"{name}.{layer}_proj", transpose=True, kind="experts")
        for layer in LAYERS
    )
    biases = tuple(
        TensorEntry(f"{path}/{layer}/bias", f"{name}.{layer}_proj_bias", kind="experts") for layer in LAYERS
    )
    return (*kernels, *biases) if bias else kernels


def router(path: str, name: str) -> tuple[TensorEntry, TensorEntry]:
    """The kernel and bias of a router, which no class of linear layers holds at Hugging Face."""
    return (
        TensorEntry(f"{path}/kernel", f"{name}.weight", transpose=True, kind="parameter"),
        TensorEntry(f"{path}/bias", f"{name}.bias"),
    )


# gpt-oss: `gate_up_proj` [E, in, 2 out], or codes [E, 2 out, in], whose outputs are gate's and up's in turn.

_INTERLEAVED = re.compile(r"(.*\.experts\.)(gate_up|down)_proj(_bias)?")


def from_interleaved(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """The tensors of gpt-oss by the names of the table, `gate` and `up` apart."""
    found: dict[str, Stored] = {}
    for name, tensor in tensors.items():
        match = _INTERLEAVED.fullmatch(name)
        if match is None:
            found[name] = tensor
            continue
        prefix, layer, end = match[1], match[2], match[3] or ""
        swapped = not end and isinstance(tensor, Tensor)
        if layer == "down":
            found[name] = _part(tensor, slice(None), swapped)
            continue
        for first, own in enumerate(("gate", "up")):
            found[f"{prefix}{own}_proj{end}"] = _part(tensor, slice(first, None, 2), swapped)
    return found


def to_interleaved(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Undo `from_interleaved`."""
    found: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        match = re.fullmatch(r"(.*\.experts\.)(gate|up|down)_proj(_bias)?", name)
        if match is None:
            found[name] = array
            continue
        prefix, layer, end = match[1], match[2], match[3] or ""
        if layer == "down":
            found[name] = array if end else array.swapaxes(1, 2)
        elif layer == "gate":
            pair = (array, arrays[f"{prefix}up_proj{end}"])
            joined = np.stack(pair if end else [one.swapaxes(1, 2) for one in pair], axis=-1)
            found[f"{prefix}gate_up_proj{end}"] = joined.reshape(*joined.shape[:-2], -1)
    return found


# Others: `experts.0.gate_proj.weight` [out, in] and so on; or, as in memory, `experts.down_proj` and
# `experts.gate_up_proj` [E, 2 out, in], whose outputs are those of gate and then those of up.


_JOINED = re.compile(r"(.*\.experts)\.gate_up_proj")


def from_single(names: Mapping[str, str]) -> Callable[[Mapping[str, Stored]], dict[str, Stored]]:
    """What gathers the matrices of single experts by the names of the table.

    Args:
        names: by the names in a file, such as "w1", those of the table, such as "gate_proj".
    """
    single = re.compile(rf"(.*\.experts)\.(\d+)\.({'|'.join(names)})\.weight")

    def gathered(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
        found: dict[str, Stored] = {}
        stacks: dict[str, dict[int, Stored]] = {}
        for name, tensor in tensors.items():
            if match := single.fullmatch(name):
                stacks.setdefault(f"{match[1]}.{names[match[3]]}", {})[int(match[2])] = tensor
            elif (match := _JOINED.fullmatch(name)) and len(tensor.shape) > 1:
                half = tensor.shape[1] // 2
                found[f"{match[1]}.gate_proj"] = _part(tensor, slice(half), swapped=False)
                found[f"{match[1]}.up_proj"] = _part(tensor, slice(half, None), swapped=False)
            else:
                found[name] = tensor
        return found | {name: _stacked(name, own) for name, own in stacks.items()}

    return gathered


def to_single(names: Mapping[str, str]) -> Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]:
    """What undoes `from_single`."""
    of_table = {ours: theirs for theirs, ours in names.items()}
    whole = re.compile(rf"(.*\.experts)\.({'|'.join(of_table)})")

    def scattered(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}
        for name, array in arrays.items():
            match = whole.fullmatch(name)
            if match is None:
                found[name] = array
                continue
            for number, one in enumerate(array):
                found[f"{match[1]}.{number}.{of_table[match[2]]}.weight"] = one
        return found

    return scattered


@dataclasses.dataclass(frozen=True)
class PartOfOutputs(Tensor):
    """Some outputs of a tensor [E, in, out] as [E, out, in], or of [E, out].

    Attributes:
        whole: the tensor.
        outputs: which.
        swapped: whether the file has inputs before outputs.
    """

    whole: Tensor
    outputs: range
    swapped: bool

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        """The part at `index`, with a slice of step one for each axis."""
        index = (*index, *(slice(None),) * (len(self.shape) - len(index)))
        cut = self.outputs[index[1]]
        span = slice(cut.start, cut[-1] + 1) if cut else slice(0, 0)
        cuts = (index[0], index[2], span) if self.swapped else (index[0], span, *index[2:])
        found = self.whole.read(cuts)
        found = found.swapaxes(1, 2) if self.swapped else found
        return found[:, :: self.outputs.step]


@dataclasses.dataclass(frozen=True)
class OfExperts(Tensor):
    """Matrices [out, in] of single experts as one [E, out, in]."""

    experts: tuple[Tensor, ...]

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        """The part at `index`, with a slice of step one for each axis."""
        index = (*index, *(slice(None),) * (len(self.shape) - len(index)))
        cuts = tuple(slice(*cut.indices(size)) for cut, size in zip(index[1:], self.shape[1:]))
        found = [one.read(cuts) for one in self.experts[index[0]]]
        return np.stack(found) if found else np.zeros((0, *(c.stop - c.start for c in cuts)), np.float32)


def _part(tensor: Stored, outputs: slice, swapped: bool) -> Stored:
    if len(tensor.shape) < 2:
        return tensor  # of another shape than the model's, which the reader says
    shape = (tensor.shape[0], *tensor.shape[:0:-1]) if swapped else tensor.shape
    own = range(shape[1])[outputs]
    shape = (shape[0], len(own), *shape[2:])
    if isinstance(tensor, Tensor):
        return PartOfOutputs(tensor.file, tensor.name, shape, tensor.dtype, tensor, own, swapped)
    scheme = tensor.scheme

    def codes(parts: Mapping[str, Tensor], dtype: np.dtype) -> GroupCodes | np.ndarray:
        return jax.tree.map(lambda rows: rows[:, outputs], scheme.codes(parts, dtype))

    return dataclasses.replace(tensor, scheme=dataclasses.replace(scheme, codes=codes), shape=shape)


def _stacked(name: str, experts: Mapping[int, Stored]) -> Stored:
    """The matrices of all experts as one tensor.

    Raises:
        PeftError: there is none of an expert, or they differ in shape or in kind.
    """
    ordered = [experts[number] for number in sorted(experts)]
    first = ordered[0]
    if sorted(experts) != list(range(len(experts))):
        raise PeftError(f"{first.file} has {name} of the experts {sorted(experts)}, and not of each")
    for one in ordered:
        if one.shape != first.shape or type(one) is not type(first) or one.dtype != first.dtype:
            raise PeftError(
                f"{one.name} of {one.file} is {one.dtype} {list(one.shape)}, and {first.name} "
                f"{first.dtype} {list(first.shape)}: experts are alike"
            )
    shape = (len(ordered), *first.shape)
    if isinstance(first, Tensor):
        return OfExperts(first.file, name, shape, first.dtype, tuple(ordered))
    return CodedTensor(name, first.parts, _scheme_of(ordered), shape, first.dtype)


def _scheme_of(experts: Sequence[CodedTensor]) -> Scheme:
    """How the weights of several experts lie, each of which is coded by itself."""

    def codes(parts: Mapping[str, Tensor], dtype: np.dtype) -> GroupCodes | np.ndarray:
        found = [one.scheme.codes(one.parts, dtype) for one in experts]
        if len({jax.tree.structure(one) for one in found}) > 1:
            return np.stack(
                [np.asarray(one.decode() if isinstance(one, GroupCodes) else one) for one in found]
            )
        return jax.tree.map(lambda *arrays: np.stack(arrays), *found)

    return dataclasses.replace(experts[0].scheme, codes=codes)
