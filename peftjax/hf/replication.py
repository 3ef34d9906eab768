"""PEFT's `layer_replication`: an adapter on more layers than the model has, both ways."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import jax
import msgspec

from peftjax.hf.common import CONFIG
from peftjax.io.files import checked, read_json
from peftjax.transform.chain import chain
from peftjax.transform.frozen import Frozen, Params, Trainable
from peftjax.transform.registry import build
from peftjax.transform.transform import Transform

METHOD = "layer_replication"
_Layer = Annotated[int, msgspec.Meta(ge=0, le=1_000_000)]
Ranges = list[tuple[_Layer, _Layer]]


def ranges_of_file(folder: Path) -> Ranges | None:
    """The ranges of layers that a folder's adapter is on, where it is on replicated ones."""
    file = folder / CONFIG
    given = read_json(file).get(METHOD) if file.is_file() else None
    return checked(Ranges, given, file) if given else None


def ranges_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """PEFT's field for the ranges of a chain, by its configuration; empty without one."""
    parts = config["methods"] if config["name"] == "chain" else [config]
    ranges = [part["ranges"] for part in parts if part["name"] == METHOD]
    return {METHOD: [list(pair) for pair in ranges[0]]} if ranges else {}


def import_on_replicated(
    ranges: Ranges, params: Params, read: Callable[[Params], tuple[Transform, Frozen, Trainable]]
) -> tuple[Transform, Frozen, Trainable]:
    """What `read` makes of the replicated parameters, as a chain behind `layer_replication`."""
    beneath = build({"name": METHOD, "ranges": [list(pair) for pair in ranges]})
    replicated, none = beneath.init(jax.random.key(0), params)
    method, frozen, trainable = read(beneath.apply(replicated, none))
    parts: Mapping[str, Transform] = method.parts or {method.name: method}
    if not method.parts:
        state, plan, trained = (
            {method.name: frozen.state},
            ((method.name, frozen.plan),),
            {method.name: trainable},
        )
    else:
        state, plan, trained = frozen.state, frozen.plan, trainable
    whole = Frozen(
        frozen.params,
        {METHOD: replicated.state, **state},
        ((METHOD, replicated.plan), *plan),
        advanced=True,
    )
    return chain(beneath, *parts.values()), whole, {METHOD: none, **trained}
