"""The pages that follow from the code and from recorded results, written to `docs/reference/`."""

import importlib
import inspect
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType

import docstrings
import structure
import tables

import peftjax as pj
from peftjax.cli.report import method_row

ROOT = Path(__file__).parents[1]

API = {
    "adapters": ("Adapters", "peftjax.adapters"),
    "optim": ("Optimizers", "peftjax.optim"),
    "losses": ("Losses", "peftjax.losses"),
    "calibrate": ("Statistics", "peftjax.calibrate"),
    "prune": ("Pruning", "peftjax.prune"),
    "parallel": ("Several devices", "peftjax.parallel"),
    "weights": ("Structured weights", "peftjax.weights.base"),
    "models": ("Tables of weights", "peftjax.models.weight_map"),
    "decode": ("Decoding step by step", "peftjax.generation.decode"),
    "planner": ("The planner", "peftjax.planner.step"),
    "plans": ("What a plan says", "peftjax.planner.result"),
    "searches": ("Searches for what fits", "peftjax.planner.search"),
    "fit": ("Training", "peftjax.train.loop"),
    "testing": ("Checks for methods of your own", "peftjax.testing"),
}
"""The reference pages beside that of `peftjax` itself: title and module."""


def write_pages(docs: Path) -> None:
    """Write all of them anew below `docs/reference`."""
    out = docs / "reference"
    shutil.rmtree(out, ignore_errors=True)
    _write(out / "methods" / "index.md", methods_index())
    for name in pj.METHODS:
        notes = docs / "methods" / f"{name}.md"
        _write(out / "methods" / f"{name}.md", method_page(name, _text(notes)))
    _write(out / "api" / "index.md", api_index())
    for name, (title, module) in API.items():
        _write(out / "api" / f"{name}.md", _automodule(title, module))
    _write(out / "structure.md", structure.table())
    _results(out / "results")


_LABELS = {
    "mergeable": "merges into the model",
    "quantized_base": "works on a base that is no plain array",
}
"""What a page calls the facts of the registry, where not by their names."""


def method_page(name: str, notes: str) -> str:
    """The page of one method: what the registry and the docstrings say, then the notes."""
    info = pj.METHODS[name]
    factory, module = docstrings.read(info.factory), inspect.getmodule(info.factory)
    options = docstrings.signature(info.factory)
    facts = [(_LABELS.get(key, key.replace("_", " ")), value) for key, value in method_row(info).items()]
    rows = [f"| {label} | {_cell(_shown(value))} |" for label, value in facts if value != name]
    takes = "backbones of `pj.load`" if info.of_blocks else "any function of a parameter tree"
    lines = [f"# {name}", "", factory.text, ""]
    lines += ["| | |", "|---|---|", *rows, f"| models | {takes} |", ""]
    lines += ["```text", f"pj.{options}", "```", ""]
    lines += _options(factory.entries("Args"))
    if "Raises" in factory.sections:
        lines += ["**Raises.** " + " ".join(line.strip() for line in factory.sections["Raises"]), ""]
    lines += ["## Equations and memory", "", docstrings.read(module).text, ""]
    if notes:
        lines += [notes.strip(), ""]
    return "\n".join(lines)


def methods_index() -> str:
    """The overview: every entry by group, with what it trains and keeps."""
    lines = ["# Methods", "", _INDEX, ""]
    for group, infos in tables.by_group().items():
        title, said = tables.GROUPS[group]
        lines += [f"## {title}", "", said, "", tables.linked_table(infos), ""]
        lines += ["```{toctree}", ":hidden:", "", *(info.name for info in infos), "```", ""]
    return "\n".join(lines)


_INDEX = """`peftjax methods` prints these tables too: all of it comes from the registry.
"Backward keeps" is beside what the frozen model keeps anyway; of the methods that run beside the model,
instead of it. Where a method merges, `merge` is exact up to rounding."""


def api_index() -> str:
    """The reference of `peftjax` itself: its names but the methods and the modules."""
    names = [name for name in sorted(pj.__all__, key=str.lower) if name not in pj.METHODS]
    things = {name: getattr(pj, name) for name in names}
    lines = ["# API", "", "The factories of methods are in [Methods](../methods/index.md).", ""]
    lines += ["```{toctree}", *API, "```", "", "```{eval-rst}"]
    for name, thing in things.items():
        if inspect.isclass(thing):
            lines += [f".. autoclass:: peftjax.{name}", "   :members:", ""]
        elif callable(thing):
            lines += [f".. autofunction:: peftjax.{name}", ""]
    return "\n".join([*lines, "```", ""])


def _automodule(title: str, module: str) -> str:
    known = importlib.import_module(module)
    members = [f"   :members: {', '.join(_public(known))}", "   :imported-members:"]
    return "\n".join([f"# {title}", "", "```{eval-rst}", f".. automodule:: {module}", *members, "```", ""])


def _public(module: ModuleType) -> Iterable[str]:
    """The names of a module's `__all__`, or what it defines without an underscore."""
    own = (
        name
        for name, thing in vars(module).items()
        if not name.startswith("_") and getattr(thing, "__module__", None) == module.__name__
        if inspect.isclass(thing) or inspect.isfunction(thing)
    )
    return getattr(module, "__all__", None) or list(own)


def _results(out: Path) -> None:
    """A page for each experiment with the tables and plots that it recorded."""
    folders = sorted({path.parents[0] for path in ROOT.glob("experiments/*/results")})
    for folder in folders:
        lines = [f"# {folder.name}", "", _question(folder), ""]
        for table in sorted(folder.glob("results/**/*.md")):
            parts = table.relative_to(folder / "results").with_suffix("").parts
            title = " ".join(part for part in parts if part != "results") or folder.name
            lines += [f"## {title.replace('_', ' ')}", "", _below(_text(table)), ""]
            plot = table.with_suffix(".png")
            if plot.exists():
                copy = out / folder.name / "-".join(plot.relative_to(folder).parts)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(plot, copy)
                lines += [f"![{title}]({folder.name}/{copy.name})", ""]
        _write(out / f"{folder.name}.md", "\n".join(lines))
    listed = ["```{toctree}", *(folder.name for folder in folders), "```", ""]
    _write(out / "index.md", "\n".join(["# Recorded tables and plots", "", *listed]))


def _question(folder: Path) -> str:
    """What an experiment asks: its README, or the docstring of its program."""
    for name in ("README.md", "run.py", "__init__.py"):
        text = _text(folder / name)
        if name.endswith(".py"):
            found = re.match(r'r?"""(.*?)"""', text, re.DOTALL)
            text = found[1] if found else ""
        if text.strip():
            return _below(text)
    return ""


def _options(entries: Mapping[str, str]) -> list[str]:
    if not entries:
        return []
    rows = [f"| `{option}` | {_cell(text)} |" for option, text in entries.items()]
    return ["| option | |", "|---|---|", *rows, ""]


def _below(text: str) -> str:
    """Text to stand under a heading of its own: without a title, sections one level down at least."""
    lines = text.strip().splitlines()
    lines = lines[1:] if lines and lines[0].startswith("# ") else lines
    code = False
    made = []
    for line in lines:
        code ^= line.startswith("```")
        made.append(f"#{line}" if line.startswith("##") and not code else line)
    return "\n".join(made).strip()


def _linked(paper: str) -> str:
    return re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", paper)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _shown(fact: str | bool) -> str:
    return _linked(fact) if isinstance(fact, str) else ("yes" if fact else "no")


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text.rstrip() + "\n", encoding="utf-8")
