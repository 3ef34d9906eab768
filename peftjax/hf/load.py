"""An adapter that Hugging Face's PEFT saved, as a method with its frozen part and its trainable."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peftjax.core import tree
from peftjax.core.errors import PeftError
from peftjax.hf.adapted import Adapted, read_adapted
from peftjax.hf.config import LoraConfig, clean, rank_power, read_config
from peftjax.hf.forms.as_they_are import import_modules
from peftjax.hf.forms.read import form_of, import_form
from peftjax.hf.names import Model, names_of
from peftjax.hf.plain import read_plain, untrained_tables
from peftjax.hf.prefix import import_prefix, is_prefix
from peftjax.hf.replication import import_on_replicated, ranges_of_file
from peftjax.hf.tensors import read_file
from peftjax.hf.tokens import Rows, read_tokens, tokens_method
from peftjax.transform.frozen import Frozen, Params, Trainable
from peftjax.transform.registry import build
from peftjax.transform.transform import Transform

logger = logging.getLogger(__name__)


def import_peft(
    path: str | os.PathLike[str],
    model: Model,
    params: Params,
    *,
    leave_out: Sequence[str] = (),
    layouts: Mapping[str, str] | None = None,
    freeze_tables: bool = True,
) -> tuple[Transform, Frozen, Trainable]:
    """Read an adapter of PEFT's: `(method, frozen, trainable)`, to run, to train on, to save, to merge.

    The method is the one that PEFT's type is here (`peftjax.hf.forms.table`; a chain of several where layers
    or modules have other options), `prefix`, without an MLP, or `lora`, `rslora` or `dora`. It is in a chain
    behind `layer_replication` where the file is on replicated layers, with `rows` for each table that
    `trainable_token_indices` trains rows of, and with `unfreeze` where the file holds parameters trained as
    they are.

    Of LoRA, the layers of one of our stacks may have different ranks, different scales or no adapter: ranks
    are padded with rows of zeros in both factors, which stay zero in training, and scales go into `b`. A rank
    larger than the matrix is brought down to it, with the same product.

    Args:
        path: the folder with `adapter_config.json` and `adapter_model.safetensors`.
        model: the backbone the parameters belong to; or a table, as in `export_peft`.
        params: the base parameters.
        leave_out: modules or tensors of the file that are not to be read, by PEFT's names without
            'base_model.model.'.
        layouts: axes by pattern, as in `lora`.
        freeze_tables: put embeddings and output layers that PEFT stored and did not train
            (`save_embedding_layers`) into the frozen base, which `save_adapter` does not write; False trains
            those that are not the base's, so that they go with the adapter.

    Raises:
        PeftError: the adapter is of another method or of a variant that we have not, or its
            initialization needs the base's residual; a tensor has no place in the model, another shape, or
            is missing.
    """
    folder = Path(path)

    def read(params: Params) -> tuple[Transform, Frozen, Trainable]:
        return _imported(folder, model, params, leave_out, layouts, freeze_tables)

    ranges = ranges_of_file(folder)
    return read(params) if ranges is None else import_on_replicated(ranges, params, read)


def _imported(
    folder: Path,
    model: Model,
    params: Params,
    leave_out: Sequence[str],
    layouts: Mapping[str, str] | None,
    freeze_tables: bool,
) -> tuple[Transform, Frozen, Trainable]:
    if is_prefix(folder):
        if leave_out:
            raise PeftError(f"{folder}: a prefix is read whole; give no leave_out")
        return import_prefix(folder, model, params)
    if (form := form_of(folder)) is not None:
        if form.as_they_are:
            return import_modules(form, folder, model, params, leave_out=leave_out)
        return import_form(form, folder, model, params, leave_out=leave_out, layouts=layouts)
    config = read_config(folder)
    file = read_file(folder, leave_out)
    names = names_of(model, params)
    leaves = tree.named_leaves(params)
    try:
        adapted = read_adapted(config, file, names, leaves, layouts)
        plain = read_plain(config, file, names, leaves)
        stored = untrained_tables(config, file, names)
        tokens = read_tokens(config, file, names, leaves)
    except PeftError as error:
        raise PeftError(f"{folder}: {error}") from error
    tables = {path: plain.pop(path) for path in sorted(stored & plain.keys())}
    tables = {path: table for path, table in tables.items() if not np.array_equal(table, leaves[path])}
    if freeze_tables and tables:
        logger.warning("%s: the base's %s replaced by the file's, not trained", folder, ", ".join(tables))
        params = tree.replace(
            params, {path: jnp.asarray(table, leaves[path].dtype) for path, table in tables.items()}
        )
    elif tables:
        plain |= tables
    for path in tokens.keys() & plain.keys():  # a table that is trained whole has its rows inside
        plain[path] = tokens.pop(path).put_into(plain[path])
    bias, of_bias = _bias(config, leaves, adapted, plain)
    options = _options(config, adapted, bias, layouts)
    rest = [name for name in plain if name not in of_bias]
    parts = [options] if adapted else []
    parts += [tokens_method(path, rows) for path, rows in tokens.items()]
    parts += [{"name": "unfreeze", "targets": "|".join(map(re.escape, rest))}] if rest else []
    values = [lambda fresh: _filled(fresh, adapted, plain, options)] if adapted else []
    values += [partial(_of_rows, path, rows) for path, rows in tokens.items()]
    values += [lambda fresh: {name: jnp.asarray(plain[name], leaf.dtype) for name, leaf in fresh.items()}]
    if len(parts) == 1:
        method = build(parts[0])
        frozen, fresh = method.init(jax.random.key(0), params)
        return method, frozen, values[0](fresh)
    method = build({"name": "chain", "methods": parts})
    frozen, fresh = method.init(jax.random.key(0), params)
    return method, frozen, {name: fill(fresh[name]) for (name, _), fill in zip(frozen.plan, values)}


def _of_rows(path: str, rows: Rows, fresh: Trainable) -> Trainable:
    return {path: {"values": jnp.asarray(rows.values, fresh[path]["values"].dtype)}}


def _bias(
    config: LoraConfig, leaves: Mapping[str, Any], adapted: Mapping[str, Adapted], plain: Mapping[str, Any]
) -> tuple[str, set[str]]:
    """The low-rank method's option `bias`, and the biases that it then trains."""
    every = {name for name in leaves if name.rsplit("/", 1)[-1] == "bias"}
    own = {f"{tree.module_of(name)}/bias" for name in adapted} & every
    if any(layer.shift is not None for adapter in adapted.values() for layer in adapter.layers.values()):
        return "added", own & plain.keys()
    if config.bias == "all" and every and every <= plain.keys():
        return "all", every
    if (config.bias_of_adapted or config.lora_bias) and own and own <= plain.keys():
        return "adapted", own
    return "none", set()


def _options(
    config: LoraConfig, adapted: Mapping[str, Adapted], bias: str, layouts: Mapping[str, str] | None
) -> dict[str, Any]:
    """What `build` makes the low-rank method from."""
    ranks = {name: own.rank for name, own in adapted.items()}
    alphas = {name: clean(own.scale * rank_power(own.rank, config.rslora)) for name, own in adapted.items()}
    plain_name = "rslora" if config.rslora else "lora"
    return {
        "name": "dora" if config.dora else plain_name,
        **({"rslora": config.rslora} if config.dora else {}),
        "rank": config.rank,
        "alpha": config.alpha,
        "targets": "|".join(map(re.escape, adapted)),
        "layers": _layers(adapted),
        "rank_pattern": _others(ranks, config.rank),
        "alpha_pattern": _others(alphas, config.alpha),
        "layouts": None if layouts is None else dict(layouts),
        "bias": bias,
        "dropout": config.dropout,
    }


def _layers(adapted: Mapping[str, Adapted]) -> list[int] | None:
    """The layers that every adapter has, when it is of the same part of its stack; else None, all."""
    held = {tuple(own.layers) for own in adapted.values()}
    partial = any(own.layout.stack and len(own.layers) < own.layout.stack[0] for own in adapted.values())
    if len(held) > 1 or not partial:
        return None
    return [number for number in held.pop() if number is not None]


def _others(values: Mapping[str, Any], usual: Any) -> dict[str, Any] | None:
    return {f"^{re.escape(name)}": value for name, value in values.items() if value != usual} or None


def _filled(
    fresh: Trainable, adapted: Mapping[str, Adapted], plain: Mapping[str, Any], options: Mapping[str, Any]
) -> Trainable:
    return {
        name: adapted[name].filled(slots, options["layers"])
        if name in adapted
        else {"value": jnp.asarray(plain.get(name, slots["value"]), slots["value"].dtype)}
        for name, slots in fresh.items()
    }
