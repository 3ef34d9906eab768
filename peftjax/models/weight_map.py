"""Our parameter paths <-> Hugging Face's tensor names, and the reading and writing by that table.

A linear layer's `weight` [out, in] is our `kernel` [in, out], a convolution's [out, in, *window] is
[*window, in, out]; a layer's tensors are rows of our stacked leaf [L, ...]. Reading fills the final
arrays tensor by tensor, in their final dtype.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from peftjax.errors import PeftError
from peftjax.io.safetensors import find_tensors, read_tensors

FLOATS = tuple(map(np.dtype, (np.float64, np.float32, np.float16, jnp.bfloat16)))

Kind = Literal["linear", "convolution"]


@dataclasses.dataclass(frozen=True)
class Weight:
    """One parameter.

    Attributes:
        path: ours, such as `blocks/attention/query/kernel`.
        name: Hugging Face's, with `{layer}` where the layer's number stands.
        transpose: whether the two axes are swapped; of a convolution, whether ours is [*window, in, out]
            where Hugging Face has [out, in, *window].
        kind: what Hugging Face's module is.
        leading: axes of length one that Hugging Face's tensor has before ours.
    """

    path: str
    name: str
    transpose: bool = False
    kind: Kind = "linear"
    leading: int = 0


def linear(path: str, name: str) -> tuple[Weight, Weight]:
    """The kernel and bias of a linear layer."""
    return (
        Weight(f"{path}/kernel", f"{name}.weight", transpose=True),
        Weight(f"{path}/bias", f"{name}.bias"),
    )


def conv1d(path: str, name: str) -> tuple[Weight, Weight]:
    """The kernel and bias of Hugging Face's `Conv1D`, a linear layer stored [in, out]."""
    return Weight(f"{path}/kernel", f"{name}.weight"), Weight(f"{path}/bias", f"{name}.bias")


def convolution(path: str, name: str) -> tuple[Weight, Weight]:
    """The kernel [*window, in, out] and bias of a convolution."""
    return (
        Weight(f"{path}/kernel", f"{name}.weight", transpose=True, kind="convolution"),
        Weight(f"{path}/bias", f"{name}.bias"),
    )


def norm(path: str, name: str) -> tuple[Weight, Weight]:
    """The scale and bias of a layer norm."""
    return Weight(f"{path}/scale", f"{name}.weight"), Weight(f"{path}/bias", f"{name}.bias")


def embedding(path: str, name: str) -> Weight:
    """An embedding table."""
    return Weight(f"{path}/embedding", f"{name}.weight")


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What a checkpoint gave.

    Attributes:
        params: numpy arrays by path; without the `fresh` ones.
        fresh: paths the checkpoint lacks, which the caller draws at random.
        unused: the checkpoint's names that nothing read.
    """

    params: dict[str, np.ndarray]
    fresh: tuple[str, ...]
    unused: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class _Slot:
    weight: Weight
    layer: int | None

    @property
    def path(self) -> str:
        return self.weight.path

    def view(self, leaves: Mapping[str, np.ndarray]) -> np.ndarray:
        """The part of our leaf that holds the tensor, in Hugging Face's orientation."""
        leaf = leaves[self.path]
        part = leaf if self.layer is None else leaf[self.layer, ...]
        if self.weight.transpose:
            part = np.moveaxis(part, (-1, -2), (0, 1)) if self.weight.kind == "convolution" else part.T
        return part[(None,) * self.weight.leading]


def read_weights(
    folder: Path,
    specs: Mapping[str, Any],
    weights: tuple[Weight, ...],
    *,
    dtype: str,
    canonical: Callable[[str], str],
    ignored: str,
    task_weights: str | None,
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

    Raises:
        PeftError: for a missing name, a wrong shape, a dtype that is not a float, two tensors for
            one name, or an unreadable file.
    """
    shapes = {path: spec.shape for path, spec in flatten_dict(specs, sep="/").items()}
    slots = _slots(shapes, weights)
    files = find_tensors(folder)
    sources: dict[str, str] = {}
    for name in files:
        if canonical(name) in sources:
            raise PeftError(f"{folder} holds both {sources[canonical(name)]} and {name}")
        sources[canonical(name)] = name
    missing = [name for name in slots if name not in sources]
    fresh = _fresh({slots[name].path for name in missing}, set(shapes), task_weights)
    lost = [name for name in missing if slots[name].path not in fresh]
    if lost:
        count = f"{len(lost)} tensors this model needs" if len(lost) > 1 else "a tensor"
        raise PeftError(f"{folder} lacks {count}: {_abridged(lost)}")
    leaves = {path: np.empty(shape, np.dtype(dtype)) for path, shape in shapes.items() if path not in fresh}
    wanted = {source: name for name, source in sources.items() if name in slots}
    for source, tensor in read_tensors({source: files[source] for source in wanted}):
        view = slots[wanted[source]].view(leaves)
        if tensor.shape != view.shape:
            raise PeftError(
                f"{source} of {files[source]} has shape {list(tensor.shape)}; "
                f"the model needs {list(view.shape)}"
            )
        if tensor.dtype not in FLOATS:
            raise PeftError(f"{source} of {files[source]} is {tensor.dtype}, not a float")
        view[...] = tensor
    unused = tuple(
        source for name, source in sources.items() if name not in slots and not re.fullmatch(ignored, name)
    )
    return Loaded(leaves, tuple(sorted(fresh)), unused)


def to_hf(params: Mapping[str, Any], weights: tuple[Weight, ...]) -> dict[str, np.ndarray]:
    """Hugging Face's tensors of `params` as numpy views: layers unstacked, kernels transposed.

    Raises:
        PeftError: for a parameter that is not in the table.
    """
    leaves = {path: np.asarray(leaf) for path, leaf in flatten_dict(params, sep="/").items()}
    slots = _slots({path: leaf.shape for path, leaf in leaves.items()}, weights)
    return {name: slot.view(leaves) for name, slot in slots.items()}


def _slots(shapes: Mapping[str, tuple[int, ...]], weights: tuple[Weight, ...]) -> dict[str, _Slot]:
    """Where each Hugging Face tensor of the parameters `shapes` lies in them."""
    table = {weight.path: weight for weight in weights}
    slots = {}
    for path, shape in shapes.items():
        if path not in table:
            raise PeftError(f"parameter {path} {list(shape)} has no Hugging Face name")
        weight = table[path]
        layers = range(shape[0]) if "{layer}" in weight.name else (None,)
        for layer in layers:
            slots[weight.name.format(layer=layer)] = _Slot(weight, layer)
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
