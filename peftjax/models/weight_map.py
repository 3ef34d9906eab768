"""Our parameter paths <-> Hugging Face's tensor names, and the reading and writing by that table.

A linear layer's `weight` [out, in] is our `kernel` [in, out]; a layer's tensors are rows of our
stacked leaf [L, ...]. Reading makes the final arrays leaf by leaf, in their final dtype and sharding; of
each tensor only the part that a device of this process holds is read.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array

from peftjax.core.errors import PeftError
from peftjax.io.safetensors import Tensor, describe_tensors, find_tensors
from peftjax.models.quantized.scheme import CodedTensor, one_layer
from peftjax.weights.coding import Coding, code_shardings, rows_of, stacked
from peftjax.weights.layout import Layout, layout_of
from peftjax.weights.quantized import Quantized

# What the module with a `weight` is at Hugging Face, where that decides the form of an adapter; 'tied' is
# an output layer that shares an embedding's table, and so has its inputs and outputs exchanged.
Kind = Literal["linear", "embedding", "convolution", "tied"]
FLOATS = tuple(map(np.dtype, (np.float64, np.float32, np.float16, jnp.bfloat16)))
Stored = Tensor | CodedTensor
"""What a checkpoint holds of a parameter."""
BLOCK_NUMBERS = 2**20
"""How many numbers of a tensor are read at a time: 4 MiB of float32, twice, beside the result."""

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """One parameter.

    Attributes:
        path: ours, such as `blocks/attention/query/kernel`.
        name: Hugging Face's, with `{layer}` where the layer's number stands.
        transpose: whether the two axes are swapped; of a convolution, whether ours is channel-last,
            [*window, in, out], where Hugging Face has [out, in, *window].
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
class Loaded:
    """What a checkpoint gave.

    Attributes:
        params: arrays and codes by path; without the `fresh` ones.
        fresh: paths the checkpoint lacks, which the caller draws at random.
        unused: the checkpoint's names that nothing read.
    """

    params: dict[str, Array | Quantized]
    fresh: tuple[str, ...]
    unused: tuple[str, ...]


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


def read_weights(
    folder: Path,
    specs: Mapping[str, Any],
    weights: tuple[TensorEntry, ...],
    *,
    dtype: str,
    canonical: Callable[[str], str],
    ignored: str,
    task_weights: str | None,
    place: Callable[[str, tuple[int, ...]], Sharding | None] = lambda path, shape: None,
    others: Mapping[str, Sequence[str]] | None = None,
    skipped: Collection[str] = (),
    codings: Mapping[str, Coding] | None = None,
    stored: Mapping[str, Stored] | None = None,
) -> Loaded:
    """Read the parameters of `specs` from the safetensors of `folder`.

    Args:
        folder: the checkpoint.
        specs: the parameter tree, as arrays or shapes.
        weights: the family's table.
        dtype: dtype of the result.
        canonical: spelling of a checkpoint's name in `weights`.
        ignored: regular expression of canonical names not to report as unused.
        task_weights: prefix of the paths that are `fresh` when the checkpoint has none of them;
            so is then any other module of the head that it lacks altogether.
        place: sharding of the parameter at a path, by its shape; None is the default device.
        others: all names that stand for a tensor, by its name in `weights`; the first that the checkpoint
            holds is read, and may be read for several.
        skipped: paths that are not read and are `fresh`.
        codings: how parameters are coded as they are read, by path.
        stored: what the checkpoint holds, by name; by default what its files say.

    Raises:
        PeftError: for a missing name, a wrong shape, a dtype that is not a float, two tensors for
            one name, or an unreadable file.
    """
    shapes = {path: spec.shape for path, spec in flatten_dict(specs, sep="/").items()}
    slots = slots_of(shapes, weights)
    stored = describe_tensors(find_tensors(folder)) if stored is None else stored
    sources: dict[str, str] = {}
    for name in stored:
        if canonical(name) in sources:
            raise PeftError(f"{folder} holds both {sources[canonical(name)]} and {name}")
        sources[canonical(name)] = name
    held = {
        name: [other for other in (others or {}).get(name, (name,)) if other in sources]
        for name, slot in slots.items()
        if slot.path not in skipped
    }
    missing = [name for name, names in held.items() if not names]
    wanted = {name: sources[names[0]] for name, names in held.items() if names}
    copied = {source for source, count in Counter(wanted.values()).items() if count > 1}
    own = set(shapes) - {slots[name].path for name, source in wanted.items() if source in copied}
    fresh = _fresh({slots[name].path for name in missing}, own, task_weights)
    fresh |= set(skipped)
    lost = [name for name in missing if slots[name].path not in fresh]
    if lost:
        count = f"{len(lost)} tensors this model needs" if len(lost) > 1 else "a tensor"
        raise PeftError(f"{folder} lacks {count}: {_abridged(lost)}")
    read = set(wanted.values())
    parts: dict[str, dict[int | None, Stored]] = {}
    for name, source in wanted.items():
        slot, tensor = slots[name], stored[source]
        _require_fit(tensor, slot.shape(shapes[slot.path]))
        parts.setdefault(slot.path, {})[slot.layer] = tensor
    table = {slot.path: slot.weight for slot in slots.values()}
    # The largest first: the copy that a leaf needs on its way to the device meets an emptier memory.
    ordered = sorted(parts, key=lambda path: (-math.prod(shapes[path]), path))
    leaves, leaves_of = {}, flatten_dict(specs, sep="/")
    for path in ordered:
        args = table[path], parts[path], shapes[path], dtype, place(path, shapes[path])
        codes = read_codes(*args, layout_of(path, leaves_of, None)) if any_coded(parts[path]) else None
        coding = (codings or {}).get(path)
        if codes is None:
            codes = read_leaf(*args) if coding is None else read_coded(*args, coding)
        leaves[path] = codes
    unused = tuple(
        source for name, source in sources.items() if source not in read and not re.fullmatch(ignored, name)
    )
    return Loaded(leaves, tuple(sorted(fresh)), unused)


def read_leaf(
    weight: TensorEntry,
    tensors: Mapping[int | None, Stored],
    shape: tuple[int, ...],
    dtype: str,
    sharding: Sharding | None,
) -> Array:
    """One parameter, in its final dtype and sharding.

    Args:
        weight: its name and orientation.
        tensors: by layer, what holds it; under None where it is not stacked.
        shape: ours.
        dtype: ours.
        sharding: where it goes; None is the default device.

    Raises:
        PeftError: when a tensor cannot be read.
    """
    held: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

    def part(index: tuple[slice, ...]) -> np.ndarray:
        bounds = tuple(cut.indices(size)[:2] for cut, size in zip(index, shape))
        if bounds not in held:  # devices may hold the same part
            held[bounds] = read_part(weight, tensors, tuple(slice(*ends) for ends in bounds), dtype)
        return held[bounds]

    if sharding is None:
        return jax.block_until_ready(jnp.asarray(part((slice(None),) * len(shape))))
    return jax.block_until_ready(jax.make_array_from_callback(shape, sharding, part))


def read_codes(
    weight: TensorEntry,
    tensors: Mapping[int | None, Stored],
    shape: tuple[int, ...],
    dtype: str,
    sharding: Sharding | None,
    layout: Layout,
) -> Quantized | None:
    """One parameter that the checkpoint holds as codes; None where they are no codes of one format of ours.

    Args:
        weight: its name and orientation.
        tensors: by layer, what holds it; under None where it is not stacked.
        shape: ours.
        dtype: of what the codes stand for.
        sharding: where it goes; None is the default device.
        layout: of ours.

    Raises:
        PeftError: the codes cannot be read, or are of a weight of another kind than a linear layer's.
    """
    first = next(iter(tensors.values()))
    if not weight.transpose or weight.kind != "linear":
        raise PeftError(
            f"{first.name} of {first.file} is coded; codes are read of linear layers [out, in] alone"
        )
    alike = True

    def layers() -> Iterator[Quantized]:
        nonlocal alike
        kind = None
        for layer in sorted(tensors, key=lambda layer: layer or 0):
            tensor = tensors[layer]
            codes = tensor.codes(np.dtype(dtype)) if isinstance(tensor, CodedTensor) else None
            kind = kind or jax.tree.structure(codes)
            if codes is None or jax.tree.structure(codes) != kind:
                alike = False
                return
            codes = codes if layer is None else one_layer(codes)
            yield Quantized(codes, of_layer, np.dtype(dtype), rows_of(layout))

    of_layer = layout if None in tensors else layout.resized((1, *shape[1:]))
    if None in tensors:
        found = next(layers(), None)
        places = (
            code_shardings(found, sharding) if found and isinstance(sharding, NamedSharding) else sharding
        )
        found = found and jax.device_put(found, places)
    else:
        found = stacked(layers(), layout, sharding)
    if found is None or not alike:
        logger.warning(
            "%s: decoded, since its codes are in groups of another order, or of another format in each layer",
            weight.path,
        )
        return None
    return jax.block_until_ready(found)


def any_coded(tensors: Mapping[int | None, Stored]) -> bool:
    """Whether the checkpoint holds any layer as codes."""
    return any(isinstance(tensor, CodedTensor) for tensor in tensors.values())


def read_coded(
    weight: TensorEntry,
    tensors: Mapping[int | None, Stored],
    shape: tuple[int, ...],
    dtype: str,
    sharding: Sharding | None,
    coding: Coding,
) -> Quantized:
    """One parameter as codes; of a stack, one layer at a time is there in its dtype.

    Args:
        weight: its name and orientation.
        tensors: by layer, what holds it; under None where it is not stacked.
        shape: ours.
        dtype: of what the codes stand for.
        sharding: where it goes; None is the default device.
        coding: how it is coded.

    Raises:
        PeftError: when a tensor cannot be read.
    """
    if None in tensors or not coding.by_layer:
        return jax.block_until_ready(coding(read_leaf(weight, tensors, shape, dtype, sharding)))
    # A layer goes where its part of the whole goes; which device has which layers, the codes follow.
    of_layer = sharding
    if isinstance(sharding, NamedSharding):
        of_layer = NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec[1:]))
    layers = (read_leaf(weight, {0: tensors[n]}, (1, *shape[1:]), dtype, of_layer) for n in range(shape[0]))
    return coding.of_layers(layers, sharding)


def read_part(
    weight: TensorEntry, tensors: Mapping[int | None, Stored], index: tuple[slice, ...], dtype: str
) -> np.ndarray:
    """The part of a parameter at `index`, read a block of rows at a time.

    Args:
        weight: its name and orientation.
        tensors: by layer, what holds it; under None where it is not stacked.
        index: a slice with its ends for each of our axes.
        dtype: ours.

    Raises:
        PeftError: when a tensor cannot be read.
    """
    result = np.empty([cut.stop - cut.start for cut in index], np.dtype(dtype))
    stacked = None not in tensors
    inner = index[1:] if stacked else index
    layers = range(index[0].start, index[0].stop) if stacked else (None,)
    axes = weight.axes(len(inner))
    cut = tuple(inner[axis] for axis in axes)
    for place, layer in enumerate(layers):
        out = (result[place, ...] if stacked else result).transpose(axes)
        # A coded tensor is decoded as a whole.
        for rows in (cut,) if isinstance(tensors[layer], CodedTensor) else _blocks(cut):
            start = rows[0].start - cut[0].start
            block = tensors[layer].read((slice(0, 1),) * weight.leading + rows)
            block = block.reshape(block.shape[weight.leading :])
            out[start : start + len(block)] = block
    return result


def _blocks(cut: tuple[slice, ...]) -> Iterator[tuple[slice, ...]]:
    """`cut` as runs of rows of at most `BLOCK_NUMBERS` numbers."""
    width = math.prod(axis.stop - axis.start for axis in cut[1:])
    step = max(1, BLOCK_NUMBERS // max(width, 1))
    for start in range(cut[0].start, cut[0].stop, step):
        yield slice(start, min(start + step, cut[0].stop)), *cut[1:]


def _require_fit(tensor: Stored, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise PeftError(
            f"{tensor.name} of {tensor.file} has shape {list(tensor.shape)}; the model needs {list(shape)}"
        )
    if tensor.dtype not in FLOATS:
        raise PeftError(
            f"{tensor.name} of {tensor.file} is {tensor.dtype}; "
            f"a weight is one of {', '.join(map(str, FLOATS))}"
        )


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


def _fresh(missing: set[str], paths: set[str], task_weights: str | None) -> set[str]:
    """The missing paths that may be drawn: see `task_weights` of `read_weights`."""
    if task_weights is None:
        return set()
    task = {path for path in paths if path.startswith(task_weights)}
    if not task <= missing:
        return set()

    def module(path: str) -> set[str]:
        return {other for other in paths if other.rpartition("/")[0] == path.rpartition("/")[0]}

    return {path for path in missing if path.startswith("head/") and module(path) <= missing}


def _abridged(names: list[str], limit: int = 4) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
