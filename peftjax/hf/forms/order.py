"""The order in which PEFT meets the modules of a class, by which it numbers some arrays."""

from __future__ import annotations

from collections.abc import Iterable

from peftjax.core.errors import PeftError
from peftjax.hf.names import Names

SECTIONS = ("embed/", "blocks/", "head/")
OTHERS = ("OPT",)
"""Classes whose layers have their modules in another order than the table."""


def in_order(names: Names, modules: Iterable[str]) -> list[str]:
    """The names of modules' weights, layer by layer and in each as the table has them.

    Raises:
        PeftError: the class has another order, or several stacks of layers.
    """
    places = {name: place for place, name in enumerate(names.slots)}

    def key(name: str) -> tuple[int, int, int]:
        slot = names.slots[name]
        section = [n for n, start in enumerate(SECTIONS) if slot.path.startswith(start)]
        if not section or names.architecture.startswith(OTHERS):
            raise PeftError(
                f"PEFT numbers this type's arrays in the order of the modules of {names.architecture}, which "
                "is not known here; merge the adapter in PEFT"
            )
        return section[0], -1 if slot.layer is None else slot.layer, places[name]

    return sorted(modules, key=key)
