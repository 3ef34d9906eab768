"""The rooms of the package and which imports which, read from the source; run it to print them."""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "peftjax"


def arrows(package: Path = PACKAGE) -> dict[str, set[str]]:
    """The rooms that each room imports, those under TYPE_CHECKING too; a file of the top level is a room."""
    found: dict[str, set[str]] = {}
    for file in sorted(package.rglob("*.py")):
        room = file.relative_to(package).parts[0].removesuffix(".py")
        if room != "__init__":
            found.setdefault(room, set()).update(_imported(file, package) - {room})
    return found


def circles(arrows: dict[str, set[str]]) -> list[tuple[str, str]]:
    """The pairs of rooms that reach each other."""
    reached = {room: _reached(room, arrows) for room in arrows}
    return [
        (one, other)
        for one in sorted(arrows)
        for other in sorted(arrows)
        if one < other and other in reached[one] and one in reached[other]
    ]


def table() -> str:
    """A row a room, from the bottom to the top: whatever imports nothing comes first."""
    imports = arrows()
    order = sorted(imports, key=lambda room: (len(_reached(room, imports)), room))
    lines = ["| room | files | imports |", "|---|---|---|"]
    for room in order:
        files = len(list((PACKAGE / room).rglob("*.py"))) or 1
        lines.append(f"| `{room}` | {files} | {', '.join(f'`{name}`' for name in sorted(imports[room]))} |")
    count = sum(map(len, imports.values()))
    facing = circles(imports)
    together = ", ".join(f"`{one}` and `{other}`" for one, other in facing) or "none"
    return "\n".join(
        [*lines, "", f"{len(imports)} rooms, {count} arrows. Rooms that reach each other: {together}."]
    )


def _imported(file: Path, package: Path) -> set[str]:
    return {name.split(".")[1] for name in _modules(ast.parse(file.read_text("utf-8")), package.name)}


def _modules(tree: ast.AST, package: str) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == package:
            names = [f"{package}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            names = []
        yield from (name for name in names if name.startswith(f"{package}."))


def _reached(room: str, arrows: dict[str, set[str]]) -> set[str]:
    found: set[str] = set()
    new = arrows.get(room, set())
    while new:
        found |= new
        new = {other for name in new for other in arrows.get(name, set())} - found
    return found


if __name__ == "__main__":
    print(table())
