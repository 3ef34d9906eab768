"""One parameter of a checkpoint: as an array, as codes made while it is read, or as the codes stored there.

The result is made in its final dtype and sharding; of each tensor only the part that a device of this process
holds is read.
"""

import dataclasses
import gc
import logging
import math
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array

from peftjax.core.errors import PeftError
from peftjax.models.quantized.scheme import CodedTensor, Stored, one_layer
from peftjax.models.weight_map import TensorEntry
from peftjax.weights.coding import Coding, code_shardings, rows_of, stacked
from peftjax.weights.layout import Layout
from peftjax.weights.quantized import Quantized

BLOCK_NUMBERS = 2**20
"""How many numbers of a tensor are read at a time: 4 MiB of float32, twice, beside the result."""

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter that is to be read.

    Attributes:
        weight: its name and orientation.
        tensors: by layer, what holds it; under None where it is not stacked.
        shape: ours.
        dtype: of the array, or of what the codes stand for.
        sharding: where it goes; None is the default device.
    """

    weight: TensorEntry
    tensors: Mapping[int | None, Stored]
    shape: tuple[int, ...]
    dtype: str
    sharding: Sharding | None

    @property
    def is_stacked(self) -> bool:
        """Whether each layer is a tensor of its own."""
        return None not in self.tensors

    @property
    def is_coded(self) -> bool:
        """Whether the checkpoint holds any layer as codes."""
        return any(isinstance(tensor, CodedTensor) for tensor in self.tensors.values())


def read_array(parameter: Parameter) -> Array:
    """The parameter as an array.

    Raises:
        PeftError: when a tensor cannot be read.
    """
    array = _placed(parameter)
    gc.collect(0)  # JAX lets go of the NumPy arrays that it has copied at a collection
    return array


def _placed(parameter: Parameter) -> Array:
    shape, sharding = parameter.shape, parameter.sharding
    held: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

    def part(index: tuple[slice, ...]) -> np.ndarray:
        bounds = tuple(cut.indices(size)[:2] for cut, size in zip(index, shape))
        if bounds not in held:  # devices may hold the same part
            held[bounds] = read_part(parameter, tuple(slice(*ends) for ends in bounds))
        return held[bounds]

    if sharding is None:
        # jnp.asarray would copy it twice.
        return jax.block_until_ready(jax.device_put(part((slice(None),) * len(shape))))
    return jax.block_until_ready(jax.make_array_from_callback(shape, sharding, part))


def read_codes(parameter: Parameter, layout: Layout) -> Quantized | None:
    """The codes that the checkpoint holds; None where they are no codes of one format of ours.

    Args:
        parameter: one that is coded in the checkpoint.
        layout: of our axes.

    Raises:
        PeftError: the codes cannot be read, or are of a weight of another kind than a linear layer's.
    """
    tensors, sharding = parameter.tensors, parameter.sharding
    if not parameter.weight.transpose or parameter.weight.kind not in ("linear", "experts"):
        first = next(iter(tensors.values()))
        raise PeftError(
            f"{first.name} of {first.file} is coded; codes are read of linear layers alone, [out, in] or "
            "[experts, out, in]"
        )
    dtype, alike = np.dtype(parameter.dtype), True

    def layers() -> Iterator[Quantized]:
        nonlocal alike
        kind = None
        for layer in sorted(tensors, key=lambda layer: layer or 0):
            tensor = tensors[layer]
            codes = tensor.codes(dtype) if isinstance(tensor, CodedTensor) else None
            kind = kind or jax.tree.structure(codes)
            if codes is None or jax.tree.structure(codes) != kind:
                alike = False
                return
            codes = codes if layer is None else one_layer(codes)
            yield Quantized(codes, of_layer, dtype, rows_of(layout))

    of_layer = layout.resized((1, *parameter.shape[1:])) if parameter.is_stacked else layout
    if parameter.is_stacked:
        found = stacked(layers(), layout, sharding)
    else:
        found = next(layers(), None)
        named = found and isinstance(sharding, NamedSharding)
        found = found and jax.device_put(found, code_shardings(found, sharding) if named else sharding)
    if found is None or not alike:
        logger.warning(
            "%s: decoded, since its codes are in groups of another order, or of another format in each layer",
            parameter.weight.path,
        )
        return None
    return jax.block_until_ready(found)


def code_as_read(parameter: Parameter, coding: Coding) -> Quantized:
    """The parameter as new codes; of a stack, one layer at a time is there in its dtype.

    Args:
        parameter: what is read.
        coding: how it is coded.

    Raises:
        PeftError: when a tensor cannot be read.
    """
    if not parameter.is_stacked or not coding.by_layer:
        return jax.block_until_ready(coding(read_array(parameter)))
    # A layer goes where its part of the whole goes; which device has which layers, the codes follow.
    sharding = of_layer = parameter.sharding
    if isinstance(sharding, NamedSharding):
        of_layer = NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec[1:]))
    shape = (1, *parameter.shape[1:])
    layers = (
        dataclasses.replace(parameter, tensors={0: parameter.tensors[n]}, shape=shape, sharding=of_layer)
        for n in range(parameter.shape[0])
    )
    return coding.of_layers(map(read_array, layers), sharding)


def read_part(parameter: Parameter, index: tuple[slice, ...]) -> np.ndarray:
    """The part of a parameter at `index`, read a block of rows at a time.

    Args:
        parameter: what is read.
        index: a slice with its ends for each of our axes.

    Raises:
        PeftError: when a tensor cannot be read.
    """
    weight, tensors = parameter.weight, parameter.tensors
    result = np.empty([cut.stop - cut.start for cut in index], np.dtype(parameter.dtype))
    stacked = parameter.is_stacked
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
