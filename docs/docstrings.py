"""Docstrings as this project writes them (Markdown, Google's sections), read into pages."""

import inspect
import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields|Examples?|References):$")
_ENTRY = re.compile(r"(\*{0,2}\w+): ?(.*)$")


@dataclass(frozen=True)
class Docstring:
    """The parts of a docstring.

    Attributes:
        text: what stands before the first section.
        sections: the lines of each section by its name, without their indentation.
    """

    text: str
    sections: dict[str, list[str]] = field(default_factory=dict)

    def entries(self, section: str) -> dict[str, str]:
        """The `name: text` entries of a section, each on one line."""
        found: dict[str, str] = {}
        name = ""
        for line in self.sections.get(section, []):
            entry = None if line.startswith(" ") else _ENTRY.match(line)
            if entry:
                name = entry[1]
                found[name] = entry[2]
            elif name:
                found[name] = f"{found[name]} {line.strip()}".strip()
        return found


def read(what: Any) -> Docstring:
    """The docstring of a module, class or function, taken apart."""
    text: list[str] = []
    sections: dict[str, list[str]] = {}
    lines = text
    for line in (inspect.getdoc(what) or "").splitlines():
        heading = SECTION.match(line)
        if heading:
            lines = sections.setdefault(heading[1], [])
        else:
            lines.append(line if lines is text else line.removeprefix("    "))
    return Docstring("\n".join(text).strip(), sections)


def signature(factory: Callable[..., Any]) -> str:
    """`name(*, option: type = default, ...)`, an option a line."""
    options = list(inspect.signature(factory).parameters.values())
    lines = [f"    {_parameter(option)}," for option in options]
    by_keyword = [option.kind is option.KEYWORD_ONLY for option in options]
    if any(by_keyword):
        lines.insert(by_keyword.index(True), "    *,")
    return "\n".join([f"{factory.__name__}(", *lines, ")"]) if lines else f"{factory.__name__}()"


def _parameter(option: inspect.Parameter) -> str:
    stars = {inspect.Parameter.VAR_KEYWORD: "**", inspect.Parameter.VAR_POSITIONAL: "*"}.get(option.kind, "")
    kind = "" if option.annotation is option.empty else f": {type_name(option.annotation)}"
    default = "" if option.default is option.empty else f" = {option.default!r}"
    return f"{stars}{option.name}{kind}{default}"


def type_name(annotation: Any) -> str:
    """An annotation as it is written in the source, without the names of modules."""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return re.sub(r"\b(?:[a-z_]+\.)+(?=\w)", "", text)


def markdown_to_rst(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Change Markdown's forms in a docstring to those of reStructuredText: equations are literal blocks."""
    made: list[tuple[bool, str]] = []
    in_section = False
    for number, line in enumerate(lines):
        in_section = in_section or bool(SECTION.match(line))
        literal = line.startswith("    ") and not in_section
        before = next((text for text in reversed(lines[:number]) if text.strip()), "")
        if literal and number > 1 and not lines[number - 1].strip() and not before.startswith((" ", "- ")):
            made += [(True, "::"), (True, "")]
        made.append((literal, line))
    parts = itertools.groupby(made, key=lambda item: item[0])
    texts = ((literal, "\n".join(line for _, line in some)) for literal, some in parts)
    lines[:] = "\n".join(text if literal else _escaped(text) for literal, text in texts).split("\n")


_MARKUP = re.compile(r"`[^`]+`|\\.|(?<=\w)_(?!\w)|\||(?<!\*)\*(?!\*)")


def _escaped(text: str) -> str:
    """A text whose code has two backticks, and where bars, stars and underscores outside it are no markup."""

    def changed(found: re.Match[str]) -> str:
        if found[0].startswith("`"):
            return f"`{found[0]}`"
        return found[0] if found[0].startswith("\\") else f"\\{found[0]}"

    return _MARKUP.sub(changed, text)
