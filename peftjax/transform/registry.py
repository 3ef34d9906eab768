"""The registry: every method by its name. A new method is one file and one line here."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from peftjax.core.errors import PeftError
from peftjax.core.tree import nearest
from peftjax.io.files import checked
from peftjax.methods.bottleneck import adapters, mam
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
from peftjax.methods.projected import galore, natural_galore
from peftjax.methods.prompt import prefix
from peftjax.methods.residuals import coded_residuals, s2a
from peftjax.methods.reversible import meft
from peftjax.methods.selection import plain, rows
from peftjax.methods.side import lst, sherl, unipt, vqt
from peftjax.methods.sparse import paca, sara, shira, snell, snella
from peftjax.transform.chain import chain
from peftjax.transform.options import check_options, require_shallow
from peftjax.transform.transform import MethodInfo, Transform

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
ALIASES = {"train": "unfreeze"}
"""Names of earlier versions, which saved adapters have."""


@dataclass(frozen=True)
class _Chain:
    """The options of a chain."""

    methods: list[dict[str, Any]] = field(default_factory=list)


def build(config: Mapping[str, Any]) -> Transform:
    """The method that a saved configuration describes: `{"name": ..., option: value, ...}`.

    Raises:
        PeftError: the name or an option is unknown, an option is missing, of another type or out of range, or
            methods nest too deeply.

    Examples:
        >>> pj.build({"name": "unfreeze", "targets": ["head"]}).name
        'unfreeze'
    """
    require_shallow(config)
    options = dict(config)
    name = options.pop("name", None)
    if name == "chain":
        return chain(*map(build, checked(_Chain, options, "chain").methods))
    known = ALIASES.get(name, name) if isinstance(name, str) else None
    if known not in KNOWN:
        raise PeftError(f"no method is called {name!r}; closest: {nearest(str(name), KNOWN)}")
    check_options(name, KNOWN[known].factory, options)
    # A chain's arrays are saved under the names of its methods: the saved name stays.
    return replace(KNOWN[known].factory(**options), name=name)


def describe(method: Transform) -> dict[str, Any]:
    """What `build` makes the same method from again; plain JSON values.

    Examples:
        >>> pj.describe(pj.bitfit())
        {'name': 'bitfit'}
    """
    return {"name": method.name, **method.config}
