"""Load a Hugging Face checkpoint folder as `(model, params)`, and save one."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Key

from peftjax.errors import PeftError
from peftjax.io.files import read_json, replacing
from peftjax.io.safetensors import SINGLE_FILE, write_tensors
from peftjax.models.backbone import COMPUTE_DTYPES, Backbone, Params
from peftjax.models.bert import BERT
from peftjax.models.family import Family
from peftjax.models.llama import LLAMA
from peftjax.models.weight_map import read_weights, to_hf

CONFIG_FILE = "config.json"
FAMILIES: dict[str, Family] = {family.name: family for family in (BERT, LLAMA)}

logger = logging.getLogger(__name__)


def load(
    path: str | os.PathLike[str],
    *,
    head: str = "none",
    num_labels: int | None = None,
    dtype: str = "float32",
    param_dtype: str = "float32",
    remat: str | None = None,
    key: Key[Array, ""] | None = None,
) -> tuple[Backbone, Params]:
    """Load a checkpoint of a supported family.

    Args:
        path: folder with `config.json` and safetensors, single or sharded.
        head: a head of the family; for BERT see `peftjax.models.bert.bert`.
        num_labels: columns of a classifier; default the checkpoint's.
        dtype: compute dtype of the model.
        param_dtype: dtype the parameters are stored in.
        remat: checkpoint policy of the blocks, see `Backbone`.
        key: draws the task head when the checkpoint has none. The parameters drawn, and the
            tensors of the checkpoint that nothing reads, are logged.

    Raises:
        PeftError: for an unknown family, head, dtype or policy; a missing, misshapen or unreadable
            tensor; a head to draw without `key`; labels for a head that has none.
    """
    folder = Path(path)
    family, values = read_family(folder)
    if param_dtype not in COMPUTE_DTYPES:
        raise PeftError(f"param_dtype {param_dtype!r} is not one of {', '.join(COMPUTE_DTYPES)}")
    config = family.read_config(values)
    if num_labels is not None:
        config = config.with_num_labels(num_labels)
    model = family.build(config, head=head, dtype=dtype, remat=remat)
    if num_labels is not None and not family.heads[head].labelled:
        labelled = ", ".join(name for name, spec in family.heads.items() if spec.labelled)
        raise PeftError(f"head {head!r} takes no num_labels; heads that do: {labelled}")
    specs = jax.eval_shape(model.init, jax.random.key(0))
    loaded = read_weights(
        folder,
        specs,
        family.weights,
        dtype=param_dtype,
        canonical=family.canonical,
        ignored=family.ignored,
        task_weights=family.heads[head].task_weights,
    )
    leaves: dict[str, Any] = loaded.params
    if loaded.fresh:
        if key is None:
            raise PeftError(
                f"{folder} has no weights for {', '.join(loaded.fresh)}; "
                "pass key=jax.random.key(seed) to draw them"
            )
        logger.warning("drawn at random, not in %s: %s", folder, ", ".join(loaded.fresh))
        drawn = flatten_dict({"head": model.init_head(key, specs["embed"])}, sep="/")
        leaves.update({path: drawn[path] for path in loaded.fresh})
    if loaded.unused:
        logger.info("not used from %s: %s", folder, ", ".join(loaded.unused))
    # Popped one by one, so that each numpy leaf is freed before the next goes to the device.
    arrays = {path: jnp.asarray(leaves.pop(path), param_dtype) for path in list(leaves)}
    return model, {"head": {}, **unflatten_dict(arrays, sep="/")}


def save(path: str | os.PathLike[str], model: Backbone, params: Params) -> None:
    """Write `config.json` and `model.safetensors` in a folder that `transformers` loads.

    Both files are complete before either replaces what was there.

    Args:
        path: the folder; made if absent.
        model: the backbone the parameters belong to.
        params: plain arrays with exactly the model's parameters; merge a method's first.

    Raises:
        PeftError: when a parameter is missing, unknown or has another shape than the model's.
    """
    family = FAMILIES[model.config.model_type]
    specs = flatten_dict(jax.eval_shape(model.init, jax.random.key(0)), sep="/")
    leaves = flatten_dict(params, sep="/")
    for name in sorted(specs.keys() | leaves.keys()):
        want, got = (jnp.shape(tree[name]) if name in tree else None for tree in (specs, leaves))
        if want != got:
            raise PeftError(f"parameter {name} has shape {got}; the model needs {want}")
    values: dict[str, Any] = {
        **family.write_config(model.config),
        "architectures": [family.heads[model.head_name].architecture],
    }
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / SINGLE_FILE, folder / CONFIG_FILE) as (weights_file, config_file):
        config_file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        write_tensors(weights_file, to_hf(params, family.weights), {"format": "pt"})


def read_family(folder: Path) -> tuple[Family, dict[str, Any]]:
    """The family of a checkpoint, and the content of its `config.json`.

    Raises:
        PeftError: the file cannot be read, or is of no supported family.
    """
    values = read_json(folder / CONFIG_FILE)
    name = values.get("model_type")
    if name not in FAMILIES:
        raise PeftError(f"{folder / CONFIG_FILE} has model_type {name!r}; supported: {', '.join(FAMILIES)}")
    return FAMILIES[name], values
