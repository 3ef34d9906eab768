"""A trained adapter as a folder: its numbers, and the options that its method is made from."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np

from peftjax.core import tree
from peftjax.core.errors import PeftError
from peftjax.io.files import read_as, replacing
from peftjax.io.safetensors import find_tensors, read_tensors, write_tensors
from peftjax.transform.frozen import Frozen, Params, Trainable
from peftjax.transform.registry import build, describe
from peftjax.transform.transform import Transform

TENSORS = "adapter.safetensors"
CONFIG = "adapter.json"


@dataclass(frozen=True)
class _File:
    """What `adapter.json` holds."""

    method: dict[str, Any]
    seed: Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
    info: dict[str, Any]


@dataclass(frozen=True)
class Adapter:
    """What `load_adapter` gives: everything `apply` and `merge` need, and what was noted beside it.

    `init` was given `jax.random.key(seed)`.
    """

    method: Transform
    frozen: Frozen
    trainable: Trainable
    info: Mapping[str, Any]
    seed: int


def save_adapter(
    folder: str | os.PathLike[str],
    method: Transform,
    frozen: Frozen,
    trainable: Trainable,
    *,
    seed: int,
    info: Mapping[str, Any] | None = None,
) -> None:
    """Write `adapter.safetensors` (trained numbers and the method's own state) and `adapter.json`.

    No base weight is written, but for the numbers that a method in place keeps to go back. Of a method that
    stores codes they are what is written (`Transform.stored`). Both files are complete before either replaces
    what was there.

    Args:
        folder: made if absent.
        method: the method, built from its options when loaded.
        frozen: its frozen part, of which only the state is written.
        trainable: the adapter.
        seed: `init` was given `jax.random.key(seed)`.
        info: JSON values to keep beside it, e.g. label names.
    """
    folder = Path(folder)
    tensors = {
        f"{part}/{name}": np.asarray(leaf)
        for part, values in (("trainable", method.stored(frozen, trainable)), ("state", frozen.state))
        for name, leaf in tree.named_leaves(values).items()
    }
    config = {"method": describe(method), "seed": seed, "info": dict(info or {})}
    with replacing(folder / TENSORS, folder / CONFIG) as (tensor_file, config_file):
        config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_tensors(tensor_file, tensors)


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The contents of `adapter.json`: method, seed and info.

    Raises:
        PeftError: the folder holds no adapter, or a field is missing or of a wrong type.
    """
    file = Path(folder) / CONFIG
    if not file.is_file():
        raise PeftError(f"{folder} holds no adapter: there is no {CONFIG}")
    config = read_as(_File, file)
    return {"method": config.method, "seed": config.seed, "info": config.info}


def _started(file: Path, config: Mapping[str, Any], params: Params) -> tuple[Transform, Frozen, Trainable]:
    """The method of a configuration, begun on the base.

    Raises:
        PeftError: an option cannot be, or does not fit the base.
    """
    try:
        method = build(config["method"])
        return method, *method.init(jax.random.key(config["seed"]), params)
    except PeftError as error:
        raise PeftError(f"{file}: {error}") from error


def trained_parameters(folder: str | os.PathLike[str]) -> set[str]:
    """Names under which `adapter.safetensors` may hold a parameter that is trained as it is."""
    parts = [name.removesuffix("/value").split("/") for name in find_tensors(Path(folder) / TENSORS)]
    return {"/".join(own[start:]) for own in parts for start in range(1, len(own))}


def load_adapter(folder: str | os.PathLike[str], params: Params) -> Adapter:
    """The adapter of a folder on base parameters; its trainable is what the method stores.

    Raises:
        PeftError: the folder holds no adapter, a file is damaged, or the adapter was made for another
            model; the error names the first tensor that is missing or has another shape.

    Examples:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> params = {"up": {"kernel": jnp.ones((4, 8))}}
        >>> method = pj.lora(rank=2, targets=["up"])
        >>> pj.adapters.save_adapter(folder, method, *method.init(jax.random.key(0), params), seed=0)
        >>> pj.adapters.load_adapter(folder, params).method.name
        'lora'
    """
    config = read_config(folder)
    method, frozen, fresh = _started(Path(folder) / CONFIG, config, params)
    files = find_tensors(Path(folder) / TENSORS)
    held = dict(read_tensors(files))
    wanted = {"trainable": method.stored(frozen, fresh), "state": frozen.state}
    names = {f"{part}/{name}" for part, values in wanted.items() for name in tree.named_leaves(values)}
    for name in names - held.keys():
        # In files of earlier versions the state that a method changes itself is beside what it trains.
        if (before := name.replace("state/", "trainable/", 1)) in held.keys() - names:
            held[name] = held.pop(before)
    for name in names - held.keys():  # and they drop the slot
        if name.endswith("/value") and (short := name.removesuffix("/value")) in held.keys() - names:
            held[name] = held.pop(short)
    for name, leaf in tree.named_leaves(frozen.state).items():
        # SaRA's limits, which follow from the base, they have nowhere.
        if name.endswith("/limit") and f"state/{name}" not in held:
            held[f"state/{name}"] = np.asarray(leaf)
    if extra := sorted(held.keys() - names):
        raise PeftError(f"{folder}: tensor {extra[0]!r} has no place in this model; it is another's adapter")

    def filled(part: str) -> Any:
        def fill(name: str, leaf: Any) -> jax.Array:
            tensor = held.get(f"{part}/{name}")
            if tensor is None or tensor.shape != leaf.shape:
                found = "is missing" if tensor is None else f"has shape {tensor.shape}"
                raise PeftError(
                    f"{folder}: tensor {f'{part}/{name}'!r} {found}; this model needs {leaf.shape}"
                )
            return jnp.asarray(tensor, leaf.dtype)

        return tree.map_named(fill, wanted[part])

    trainable = filled("trainable")
    frozen = Frozen(frozen.params, filled("state"), frozen.plan)
    return Adapter(method, frozen, trainable, config["info"], config["seed"])
