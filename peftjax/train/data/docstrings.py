"""The default data set: docstrings of the running Python's standard library, without a download.

A text is the docstring of a module, class or function; its label is the top-level package or module that it
comes from. The rules, all deterministic for one Python version:

1. The .py sources are parsed, never imported, without test packages and third-party packages.
2. White space becomes single spaces; texts shorter than `MIN_CHARACTERS` are dropped.
3. The labels are the `CLASSES` public packages with the most distinct texts.
4. Their names are masked in all texts (also inside a longer word): a docstring of `email` says "email", and
   the classifier has to recognize the subject instead.
5. Of exact copies within a label the first stays; a text of two labels is dropped.
6. A top-level class or function with everything in it is a group, on one side as a whole. In the order of a
   stable hash of their names, groups go to evaluation while they fit into `EVALUATION_SHARE` of the label.
"""

import ast
import hashlib
import re
import sysconfig
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from peftjax.core.errors import PeftError
from peftjax.train.data.dataset import Split, TextDataset

CLASSES = 16
MIN_CHARACTERS = 40
EVALUATION_SHARE = 0.15
MASK = "<name>"

_SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Docstring:
    """One docstring: its text, the top-level package, and the qualified name of its group."""

    text: str
    package: str
    group: str


def docstring_dataset() -> TextDataset:
    """The data set described above, from the standard library of the running Python.

    Raises:
        PeftError: the standard library's .py sources are absent or too few (a zipped Python).
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    found = [item for path in source_files(root) for item in read_docstrings(path, root)]
    names = largest_packages(found)
    if len(names) < CLASSES:
        raise PeftError(
            f"the standard library at {root} has docstrings of {len(names)} packages, "
            f"{CLASSES} are needed: this Python lacks its .py sources; give a data file instead"
        )
    kept = distinct(mask_names([item for item in found if item.package in names], names))
    held_out = {group for name in names for group in evaluation_groups(kept, name)}
    return TextDataset(
        name="docstrings",
        train=_split([item for item in kept if item.group not in held_out], names),
        evaluation=_split([item for item in kept if item.group in held_out], names),
        label_names=names,
    )


def source_files(root: Path) -> list[Path]:
    """The library's .py files below `root`, sorted, without tests and third-party packages."""
    files = (path.relative_to(root) for path in root.rglob("*.py"))
    return [root / path for path in sorted(files) if not _SKIPPED_FOLDERS & set(path.parts)]


def read_docstrings(path: Path, root: Path) -> list[Docstring]:
    """The docstrings of one file; a file that this Python cannot parse (a template) has none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in old modules are not our concern
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return []
    parts = path.relative_to(root).with_suffix("").parts
    module = ".".join(parts)
    return [
        Docstring(text, parts[0], group)
        for node, group in _documented(tree, module)
        if len(text := " ".join((ast.get_docstring(node) or "").split())) >= MIN_CHARACTERS
    ]


def _documented(tree: ast.Module, module: str) -> Iterator[tuple[_Documented, str]]:
    """Every module, class and function of a file, in source order, with its group's name."""
    stack: list[tuple[ast.AST, str]] = [(tree, module)]
    while stack:
        node, group = stack.pop()
        if isinstance(node, _Documented):
            if group == module and not isinstance(node, ast.Module):
                group = f"{module}.{node.name}"
            yield node, group
        stack.extend((child, group) for child in reversed(list(ast.iter_child_nodes(node))))


def largest_packages(items: list[Docstring]) -> tuple[str, ...]:
    """The `CLASSES` public packages with the most distinct texts (by name where equal), sorted."""
    counts = Counter(package for package, _ in {(item.package, item.text) for item in items})
    public = [name for name in counts if not name.startswith("_")]
    public.sort(key=lambda name: (-counts[name], name))
    return tuple(sorted(public[:CLASSES]))


def mask_names(items: list[Docstring], names: tuple[str, ...]) -> list[Docstring]:
    """The same docstrings with each of `names` replaced by `MASK`, the longest first."""
    longest_first = sorted(names, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, longest_first)), re.IGNORECASE)
    return [Docstring(pattern.sub(MASK, item.text), item.package, item.group) for item in items]


def distinct(items: list[Docstring]) -> list[Docstring]:
    """The first of each text; none of a text that occurs in two packages."""
    first: dict[str, Docstring] = {}
    packages: dict[str, set[str]] = defaultdict(set)
    for item in items:
        first.setdefault(item.text, item)
        packages[item.text].add(item.package)
    return [item for text, item in first.items() if len(packages[text]) == 1]


def evaluation_groups(items: list[Docstring], package: str) -> set[str]:
    """The groups of one package that are for evaluation; the same on every machine."""
    sizes = Counter(item.group for item in items if item.package == package)
    room = int(EVALUATION_SHARE * sizes.total())
    chosen = set()
    for group in sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if sizes[group] <= room:
            chosen.add(group)
            room -= sizes[group]
    return chosen


def _split(items: list[Docstring], names: tuple[str, ...]) -> Split:
    return Split(
        texts=tuple(item.text for item in items),
        labels=tuple(names.index(item.package) for item in items),
    )
