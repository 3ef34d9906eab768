"""Save a model as a Hugging Face folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from peftjax.backbone.backbone import Backbone, Params
from peftjax.core.errors import PeftError
from peftjax.io.files import replacing
from peftjax.io.safetensors import SINGLE_FILE, write_tensors
from peftjax.models.families import CONFIG_FILE, FAMILIES
from peftjax.models.family import Family
from peftjax.models.weight_map import to_hf
from peftjax.weights.base import Weight


def save(path: str | os.PathLike[str], model: Backbone, params: Params) -> None:
    """Write `config.json` and `model.safetensors` in a folder that `transformers` loads.

    Both files are complete before either replaces what was there.

    Args:
        path: the folder; made if absent.
        model: the backbone the parameters belong to.
        params: plain arrays with exactly the model's parameters; merge a method's first.

    Raises:
        PeftError: when a parameter is missing, unknown, no array or of another shape than the model's.

    Examples:
        >>> import tempfile
        >>> from peftjax.models.bert import bert
        >>> from peftjax.models.bert_config import BertConfig
        >>> sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = bert(BertConfig(**sizes, intermediate_size=32, max_position_embeddings=12), head="none")
        >>> folder = tempfile.mkdtemp()
        >>> pj.save(folder, model, model.init(jax.random.key(0)))
        >>> model, params = pj.load(folder)
    """
    family = FAMILIES[model.config.model_type]
    specs = flatten_dict(model.shapes, sep="/")
    leaves = flatten_dict(params, sep="/")
    for name, leaf in leaves.items():
        if isinstance(leaf, Weight):
            raise PeftError(
                f"parameter {name} is a {type(leaf).__name__}, and a file has arrays: merge the method "
                "first, or take peftjax.dense of each parameter"
            )
    for name in sorted(specs.keys() | leaves.keys()):
        want, got = (jnp.shape(tree[name]) if name in tree else None for tree in (specs, leaves))
        if want != got:
            raise PeftError(f"parameter {name} has shape {got}; the model needs {want}")
    _require_said(family, model, specs)
    values: dict[str, Any] = {
        **family.write_config(model.config),
        "architectures": [family.heads[model.head_name].architecture],
    }
    folder = Path(path)
    with replacing(folder / SINGLE_FILE, folder / CONFIG_FILE) as (weights_file, config_file):
        config_file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        tensors = family.scattered(to_hf(params, family.table(model)))
        write_tensors(weights_file, tensors, {"format": "pt"})


def _require_said(family: Family, model: Backbone, specs: dict[str, Any]) -> None:
    """Raise a PeftError unless a `config.json` can say the sizes of the blocks."""
    config = family.read_config({"model_type": family.name, **family.write_config(model.config)})
    told = flatten_dict(family.build(config, head=model.head_name).shapes, sep="/")
    for name, leaf in specs.items():
        if "blocks/" in name and (name not in told or told[name].shape != leaf.shape):
            by_config = told[name].shape if name in told else None
            raise PeftError(
                f"the config.json of a {family.name} cannot say the sizes of this model: {name} has shape "
                f"{leaf.shape}, and {by_config} by the configuration; save the model with those units zero "
                "(pj.prune.masked), or keep its number of heads"
            )
