"""The registry: every method by its name. A new method is one file and one line here."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from peftjax.chain import chain
from peftjax.errors import PeftError
from peftjax.io.files import checked
from peftjax.methods.blocks import adapters, coded_residuals, lst, mam, meft, prefix, s2a, sherl, unipt, vqt
from peftjax.methods.lowrank import (
    dora,
    lora,
    lora_fa,
    lora_plus,
    lowrank_restarts,
    olora,
    pissa,
    rslora,
    switchlora,
)
from peftjax.methods.options import check_options, require_shallow
from peftjax.methods.projected import galore, natural_galore
from peftjax.methods.select import plain, rows
from peftjax.methods.sparse import paca, sara, shira, snell, snella
from peftjax.transform import MethodInfo, Transform
from peftjax.tree import nearest

METHODS: dict[str, MethodInfo] = {
    info.name: info
    for info in (
        lora.METHOD,
        rslora.METHOD,
        lora_plus.METHOD,
        lora_fa.METHOD,
        dora.METHOD,
        pissa.METHOD,
        olora.METHOD,
        lowrank_restarts.METHOD,
        switchlora.METHOD,
        snell.METHOD,
        snella.METHOD,
        paca.METHOD,
        shira.METHOD,
        sara.METHOD,
        galore.METHOD,
        natural_galore.METHOD,
        rows.METHOD,
        *plain.METHODS,
        *adapters.METHODS,
        prefix.PREFIX,
        mam.MAM,
        s2a.METHOD,
        lst.METHOD,
        meft.METHOD,
        vqt.METHOD,
        unipt.METHOD,
        sherl.METHOD,
    )
}

COMPANIONS: dict[str, MethodInfo] = {info.name: info for info in (coded_residuals.METHOD,)}
"""What trains nothing by itself and goes beside a method in a chain."""
KNOWN = {**METHODS, **COMPANIONS}


@dataclass(frozen=True)
class _Chain:
    """The options of a chain."""

    methods: list[dict[str, Any]] = field(default_factory=list)


def build(config: Mapping[str, Any]) -> Transform:
    """The method that a saved configuration describes: `{"name": ..., option: value, ...}`.

    Raises:
        PeftError: the name or an option is unknown, an option is missing, of another type or out of range, or
            methods nest too deeply.
    """
    require_shallow(config)
    options = dict(config)
    name = options.pop("name", None)
    if name == "chain":
        return chain(*map(build, checked(_Chain, options, "chain").methods))
    if not isinstance(name, str) or name not in KNOWN:
        raise PeftError(f"no method is called {name!r}; closest: {nearest(str(name), KNOWN)}")
    check_options(name, KNOWN[name].factory, options)
    return KNOWN[name].factory(**options)


def describe(method: Transform) -> dict[str, Any]:
    """What `build` makes the same method from again; plain JSON values."""
    return {"name": method.name, **method.config}
