"""The tables of README.md, of a guide and of the pages on methods, from the registry.

`python docs/tables.py` writes those of `PAGES` anew; `tests/docs/test_tables.py` compares them.
"""

import re
import sys
from collections.abc import Iterable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import measured  # noqa: E402

import peftjax as pj  # noqa: E402
from peftjax.cli.report import methods_markdown  # noqa: E402
from peftjax.hf.forms.form import Form  # noqa: E402
from peftjax.hf.forms.table import FORMS  # noqa: E402

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "guides" / "from_peft.md")
"""Those that have tables of these."""

GROUPS = {
    "lowrank": ("Low rank", "Two thin factors beside each weight, or instead of it."),
    "sparse": ("Sparse", "A few rows or entries of each weight, or a sparse update of high rank."),
    "projected": ("Projected", "All weights, through low-rank projections of their gradients."),
    "structured": ("Structured", "Updates with a structure other than low rank."),
    "quantization": ("Quantized", "The base, or the adapter, in a few bits."),
    "bottleneck": ("Bottleneck", "Small layers inside the blocks."),
    "prompt": ("Prompts", "Trained keys, values or tokens before the input."),
    "side": ("Beside the model", "A small network beside the backbone, into which no gradient enters."),
    "reversible": ("Reversible", "Blocks whose inputs are recomputed from their outputs."),
    "residuals": ("Coded residuals", "What the backward pass needs, in 4 or 8 bits."),
    "selection": ("Selection", "Parameters of the model itself, trained as they are."),
    "routed": ("Routed", "Several adapters, and a router that chooses."),
}
"""The folders of `peftjax/methods`: title, and what its methods train."""


def group(info: pj.MethodInfo) -> str:
    """The folder that a method lies in."""
    return info.factory.__module__.split(".")[2]


def by_group() -> dict[str, list[pj.MethodInfo]]:
    """The entries of each folder that has any, in the order of `GROUPS`."""
    found: dict[str, list[pj.MethodInfo]] = {name: [] for name in GROUPS}
    for info in pj.METHODS.values():
        if not info.factory.__module__.startswith("peftjax."):
            continue  # of another package
        found[group(info)].append(info)
    return {name: infos for name, infos in found.items() if infos}


def linked_table(infos: Iterable[pj.MethodInfo]) -> str:
    """What `peftjax methods --markdown` prints of them, each name a link to its page."""
    table = methods_markdown({info.name: info for info in infos})
    return re.sub(r"^\| `(\w+)` \|", r"| [`\1`](\1.md) |", table, flags=re.MULTILINE)


def groups_table() -> str:
    """The README's table: a row a group."""
    lines = ["| group | what is trained | methods |", "|---|---|---|"]
    for name, infos in by_group().items():
        title, said = GROUPS[name]
        lines.append(f"| {title} | {said} | {', '.join(f'`{info.name}`' for info in infos)} |")
    return "\n".join(lines)


def peft_types_table() -> str:
    """What PEFT calls the methods whose adapters are exchanged with it, LoRA's kin and prefixes apart."""
    names = sorted((_type_of(form), form.method) for form in FORMS)
    return "\n".join(["| `peft_type` | peftjax |", "|---|---|", *(f"| {a} | `pj.{b}` |" for a, b in names)])


def _type_of(form: Form) -> str:
    """PEFT's type, and the field that tells a variant of it."""
    if form.where and form.type == "LORA":
        ((field, value),) = form.where.items()
        return f"`{form.type}` with `{field}={value!r}`"
    return f"`{form.type}`" + (f" with `{form.variant}`" if form.variant else "")


TABLES = {"groups": groups_table, "measured": measured.table, "peft types": peft_types_table}


def with_tables(text: str) -> str:
    """A text with what stands between `<!-- NAME -->` and `<!-- end -->` made anew."""
    for name, make in TABLES.items():
        place = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = place.sub(lambda found, make=make: f"{found[1]}{make()}\n{found[2]}", text)
    return text


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
