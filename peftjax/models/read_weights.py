"""The parameters of a model from a checkpoint, leaf by leaf."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Sharding
from jaxtyping import Array

from peftjax.core.errors import PeftError
from peftjax.io.safetensors import describe_tensors, find_tensors
from peftjax.models.quantized.scheme import Stored
from peftjax.models.read_parameter import Parameter, code_as_read, read_array, read_codes
from peftjax.models.weight_map import TensorEntry, slots_of
from peftjax.weights.coding import Coding
from peftjax.weights.layout import layout_of
from peftjax.weights.quantized import Quantized

FLOATS = tuple(map(np.dtype, (np.float64, np.float32, np.float16, jnp.bfloat16)))


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
        parameter = Parameter(table[path], parts[path], shapes[path], dtype, place(path, shapes[path]))
        leaf: Array | Quantized | None = None
        if parameter.is_coded:
            leaf = read_codes(parameter, layout_of(path, leaves_of, None))
        if leaf is None:
            coding = (codings or {}).get(path)
            leaf = read_array(parameter) if coding is None else code_as_read(parameter, coding)
        leaves[path] = leaf
    unused = tuple(
        source for name, source in sources.items() if source not in read and not re.fullmatch(ignored, name)
    )
    return Loaded(leaves, tuple(sorted(fresh)), unused)


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


def _abridged(names: list[str], limit: int = 4) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
