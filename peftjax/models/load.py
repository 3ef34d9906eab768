"""Load a Hugging Face checkpoint folder as `(model, params)`."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, Sharding
from jaxtyping import Array, Key

from peftjax.backbone.backbone import COMPUTE_DTYPES, Backbone, Params
from peftjax.core.errors import PeftError
from peftjax.io.files import read_json
from peftjax.models.families import CONFIG_FILE, FAMILIES, read_family
from peftjax.models.family import Family
from peftjax.models.quantized.checkpoint import stored_tensors
from peftjax.models.quantized.scheme import Stored
from peftjax.models.read_weights import read_weights
from peftjax.models.resize import VOCABULARY_AXES, require_vocabulary, resized, with_vocabulary_of
from peftjax.models.shared import copies, names_to_read, settle, untied
from peftjax.models.weight_map import slots_of
from peftjax.parallel.rules import sharding_of
from peftjax.transform.transform import Transform
from peftjax.weights.coding import Coding

Shardings = Callable[[str, tuple[int, ...]], Sharding] | Mapping[str, Any]

logger = logging.getLogger(__name__)


def load(
    path: str | os.PathLike[str],
    *,
    head: str | None = None,
    num_labels: int | None = None,
    vocab_size: int | None = None,
    redraw_head: bool = False,
    untie: bool = False,
    dtype: str = "float32",
    param_dtype: str = "float32",
    remat: str | None = None,
    key: Key[Array, ""] | None = None,
    replaced: Collection[str] = (),
    sharding: Shardings | None = None,
    mesh: Mesh | None = None,
    quantize: Transform | None = None,
    described: tuple[Family, dict[str, Any]] | None = None,
) -> tuple[Backbone, Params]:
    """Load a checkpoint of a supported family.

    Args:
        path: folder with `config.json` and safetensors, single or sharded. Weights that bitsandbytes, GPTQ,
            AWQ or compressed-tensors have quantized become `Quantized` parameters with their codes.
        head: a head of the family, see its file, such as `peftjax.models.bert.bert`; by default the one whose
            Hugging Face class `config.json` names, else "none".
        num_labels: columns of a classifier; default the checkpoint's.
        vocab_size: rows of the word table and of the output layer, where the checkpoint is to be resized: new
            ones are the mean of those it has. By default as many as the checkpoint's table has.
        redraw_head: whether layers of the task head that have another size in the checkpoint are drawn anew.
        untie: whether an output layer that is tied to the word table becomes a parameter of its own, a copy
            of the table, so that the two can be trained apart; `save` then writes both.
        dtype: compute dtype of the model.
        param_dtype: dtype the parameters are stored in.
        remat: checkpoint policy of the blocks, see `Backbone`.
        key: draws the task head when the checkpoint has none. The parameters drawn, and the
            tensors of the checkpoint that nothing reads, are logged.
        replaced: paths whose numbers the caller puts in afterwards: zeros where the task head has none.
        sharding: where each parameter goes: a function of its path and shape, or a tree like the
            parameters'. Each process reads only what its devices hold, one parameter at a time.
        mesh: of `pj.parallel.make_mesh`: parameters lie on it by the rules of `pj.parallel.shard`, and the
            model's activations too.
        quantize: a method that does nothing but code weights, such as `pj.nf4()`: they are coded as they are
            read, so that no more than one layer of one of them is in memory as floats. The parameters are
            those of its `init`, and a chain on them begins with the same method.
        described: what `read_family` gave for the folder, where the caller has read it already.

    Raises:
        PeftError: for an unknown family, head, dtype or policy; a missing, misshapen or unreadable
            tensor; a task head of another size without `redraw_head`; a head to draw without `key`; labels
            for a head that has none; a head without an output layer to untie; a sharding that is absent from
            its tree or does not divide a parameter, or is beside a mesh; a `quantize` that does something
            else.

    Examples:
        >>> model, params = pj.load("path/to/llama", head="causal_lm")  # doctest: +SKIP
        >>> model, params = pj.load("path/to/llama", quantize=pj.nf4())  # doctest: +SKIP
    """
    folder = Path(path)
    if mesh is not None and sharding is not None:
        raise PeftError("load: a mesh says where each parameter lies; leave sharding out")
    if mesh is not None:
        sharding = partial(sharding_of, mesh=mesh)
    family, values = described or read_family(folder)
    if param_dtype not in COMPUTE_DTYPES:
        raise PeftError(f"param_dtype {param_dtype!r} is not one of {', '.join(COMPUTE_DTYPES)}")
    stored = family.gathered(stored_tensors(folder, values))
    tensors = {family.canonical(name): tensor for name, tensor in stored.items()}
    config = with_vocabulary_of(family, family.read_config(values), tensors, folder)
    config = settle(family, config, tensors, folder)
    head = head or _head_of(family, values)
    build = partial(
        build_model, family, config, head, num_labels=num_labels, untie=untie, dtype=dtype, remat=remat
    )
    in_file = model = build()
    if vocab_size is not None:
        model = build(vocab_size=vocab_size)
    specs = model.shapes
    codings = _codings(quantize, specs)
    place = _placement(sharding)
    for name, spec in flatten_dict(specs, sep="/").items():
        place(name, spec.shape)
    other = _of_another_size(in_file, family, tensors, redraw_head)
    grown = set() if in_file is model else VOCABULARY_AXES.keys() & flatten_dict(specs, sep="/").keys()
    loaded = read_weights(
        folder,
        in_file.shapes,
        family.table(model),
        dtype=param_dtype,
        canonical=family.canonical,
        ignored=family.ignored,
        task_weights=family.heads[head].task_weights,
        place=lambda path, shape: None if path in grown else place(path, shape),
        others=names_to_read(family, model, untie=untie),
        skipped=other,
        codings={path: coding for path, coding in codings.items() if path not in grown},
        stored=stored,
    )
    leaves: dict[str, Any] = dict(loaded.params)

    def put(path: str, leaf: Array) -> None:
        placed = jax.device_put(leaf, place(path, leaf.shape))
        leaves[path] = codings[path](placed) if path in codings else placed

    for path in grown & leaves.keys():
        put(path, resized(path, np.asarray(leaves[path]), model))
    fresh = [path for path in loaded.fresh if path not in replaced]
    if fresh:
        if key is None:
            raise PeftError(
                f"{folder} has no weights for {', '.join(fresh)}; pass key=jax.random.key(seed) to draw them"
            )
        logger.warning("drawn at random, not in %s: %s", folder, ", ".join(fresh))
        drawn = flatten_dict({"head": model.init_head(key, specs["embed"])}, sep="/")
        for path in fresh:
            put(path, drawn[path].astype(param_dtype))
    shapes = flatten_dict(specs, sep="/")
    for path in set(loaded.fresh) - set(fresh):
        put(path, jnp.zeros(shapes[path].shape, param_dtype))
    repeated = copies(family, model, tensors)
    unused = [name for name in loaded.unused if family.canonical(name) not in repeated]
    if unused:
        logger.warning("not used from %s: %s", folder, _listed(unused, family, model))
    params = {"head": {}, **unflatten_dict(leaves, sep="/")}
    _codings(quantize, params)  # what the checkpoint holds as codes is of the same format
    return dataclasses.replace(model, mesh=mesh), params


def build_model(
    family: Family,
    config: Any,
    head: str,
    *,
    num_labels: int | None = None,
    vocab_size: int | None = None,
    untie: bool = False,
    dtype: str = "float32",
    remat: str | None = None,
) -> Backbone:
    """The model of a configuration, without parameters; the arguments are those of `load`.

    Raises:
        PeftError: for an unknown head, dtype or policy, labels for a head that has none, a vocabulary that
            cannot be, or a head without an output layer to untie.
    """
    if num_labels is not None:
        config = config.with_num_labels(num_labels)
    if untie and head in family.heads:
        config = untied(family, config, head)
    if vocab_size is not None:
        require_vocabulary(vocab_size)
        if not hasattr(config, "vocab_size"):
            raise PeftError(f"a model of the family {family.name!r} has no vocabulary to resize")
        config = dataclasses.replace(config, vocab_size=vocab_size)
    model = family.build(config, head=head, dtype=dtype, remat=remat)
    if num_labels is not None and not family.heads[head].labeled:
        labeled = ", ".join(name for name, spec in family.heads.items() if spec.labeled)
        raise PeftError(f"head {head!r} takes no num_labels; heads that do: {labeled}")
    return model


def lacking(path: str | os.PathLike[str], model: Backbone, *, untie: bool = False) -> set[str]:
    """The paths of a model's parameters that a checkpoint does not hold, which `load` draws."""
    family = FAMILIES[model.config.model_type]
    specs = flatten_dict(model.shapes, sep="/")
    tensors = {family.canonical(name): tensor for name, tensor in _stored(family, Path(path)).items()}
    slots = slots_of({name: spec.shape for name, spec in specs.items()}, family.table(model))
    others = names_to_read(family, model, untie=untie)
    absent = {
        slot.path for name, slot in slots.items() if tensors.keys().isdisjoint(others.get(name, (name,)))
    }
    return absent | _of_another_size(model, family, tensors, redraw=True)


def stored_dtypes(
    path: str | os.PathLike[str], model: Backbone, *, untie: bool = False
) -> dict[str, np.dtype]:
    """The dtype in which a checkpoint holds each of a model's parameters; of layers that differ, the widest.

    Parameters that it lacks have no entry.
    """
    family = FAMILIES[model.config.model_type]
    specs = flatten_dict(model.shapes, sep="/")
    others = names_to_read(family, model, untie=untie)
    tensors = {family.canonical(name): tensor for name, tensor in _stored(family, Path(path)).items()}
    found: dict[str, np.dtype] = {}
    for name, slot in slots_of({p: s.shape for p, s in specs.items()}, family.table(model)).items():
        read = next((tensors[other] for other in others.get(name, (name,)) if other in tensors), None)
        if read is not None and isinstance(read.dtype, np.dtype):
            found[slot.path] = np.dtype(jnp.promote_types(found.get(slot.path, read.dtype), read.dtype))
    return found


def _stored(family: Family, folder: Path) -> dict[str, Stored]:
    """What a checkpoint holds, by the names of the family's table or others of its."""
    return family.gathered(stored_tensors(folder, read_json(folder / CONFIG_FILE)))


def _of_another_size(
    model: Backbone, family: Family, tensors: Mapping[str, Stored], redraw: bool
) -> set[str]:
    """The paths of the task head's layers that have another shape in the checkpoint, to be drawn.

    Raises:
        PeftError: there are some and they are not to be drawn.
    """
    task = family.heads[model.head_name].task_weights
    if task is None:
        return set()
    shapes = {path: spec.shape for path, spec in flatten_dict(model.shapes, sep="/").items()}
    found: set[str] = set()
    for name, slot in slots_of(shapes, family.table(model)).items():
        wanted = slot.shape(shapes[slot.path])
        if slot.path.startswith(task) and name in tensors and tensors[name].shape != wanted:
            module = slot.path.rpartition("/")[0]
            found |= {path for path in shapes if path.rpartition("/")[0] == module}
            if not redraw:
                tensor = tensors[name]
                raise PeftError(
                    f"{tensor.name} of {tensor.file} has shape {list(tensor.shape)}; the head "
                    f"{model.head_name!r} needs {list(wanted)}: give num_labels as the file has it, or the "
                    "option redraw_head=True (--redraw-head) to draw those layers anew"
                )
    return found


def _listed(unused: Sequence[str], family: Family, model: Backbone) -> str:
    """The names of tensors, and how many layers there are in the file where those are more."""
    pattern = next(weight.name for weight in family.table(model) if weight.path.startswith("blocks/"))
    before = re.escape(pattern.partition("{layer}")[0])
    beyond = any(
        (found := re.match(f"{before}([0-9]+)", family.canonical(name))) and int(found[1]) >= model.num_layers
        for name in unused
    )
    more = f" (config.json has {model.num_layers} layers, and the file more)" if beyond else ""
    return ", ".join(unused) + more


def _head_of(family: Family, values: Mapping[str, Any]) -> str:
    """The first head of the class that a `config.json` names."""
    classes = values.get("architectures") or ()
    return next((name for name, head in family.heads.items() if head.architecture in classes), "none")


def _codings(quantize: Transform | None, specs: Params) -> Mapping[str, Coding]:
    """How the parameters are coded, by path."""
    if quantize is None:
        return {}
    if quantize.codings is None:
        raise PeftError(
            f"load(quantize=...) takes a method that does nothing but code weights, as pj.nf4() does; "
            f"{quantize.name!r} is applied to the parameters that load gives, by its init"
        )
    return quantize.codings(specs)


def _placement(sharding: Shardings | None) -> Callable[[str, tuple[int, ...]], Sharding | None]:
    """The sharding of each parameter by path and shape, checked; None is the default device."""
    if sharding is None:
        return lambda path, shape: None
    by_path = {} if callable(sharding) else flatten_dict(sharding, sep="/")

    def place(path: str, shape: tuple[int, ...]) -> Sharding:
        found = sharding(path, shape) if callable(sharding) else by_path.get(path)
        if not isinstance(found, Sharding):
            raise PeftError(f"sharding gives {found!r} for {path} {list(shape)}, not a jax.sharding.Sharding")
        try:
            found.shard_shape(shape)
        except ValueError as error:
            raise PeftError(f"{path} {list(shape)} cannot be placed: {error}") from error
        return found

    return place
