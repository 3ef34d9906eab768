"""The folders of the package and which imports which, read from the source; run it to print them."""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "peftjax"


def imports_of(package: Path = PACKAGE) -> dict[str, set[str]]:
    """The folders that each imports, under TYPE_CHECKING too; a file of the top level counts as one."""
    found: dict[str, set[str]] = {}
    for file in sorted(package.rglob("*.py")):
        folder = file.relative_to(package).parts[0].removesuffix(".py")
        if folder != "__init__":
            found.setdefault(folder, set()).update(_imported(file, package) - {folder})
    return found


def cycles(imports: dict[str, set[str]]) -> list[tuple[str, str]]:
    """The pairs of folders that reach each other."""
    reached = {folder: _reached(folder, imports) for folder in imports}
    return [
        (one, other)
        for one in sorted(imports)
        for other in sorted(imports)
        if one < other and other in reached[one] and one in reached[other]
    ]


def table() -> str:
    """A row a folder, from the bottom to the top: whatever imports nothing comes first."""
    imports = imports_of()
    order = sorted(imports, key=lambda folder: (len(_reached(folder, imports)), folder))
    lines = ["| folder | files | imports |", "|---|---|---|"]
    for folder in order:
        files = len(list((PACKAGE / folder).rglob("*.py"))) or 1
        lines.append(
            f"| `{folder}` | {files} | {', '.join(f'`{name}`' for name in sorted(imports[folder]))} |"
        )
    count = sum(map(len, imports.values()))
    facing = cycles(imports)
    together = ", ".join(f"`{one}` and `{other}`" for one, other in facing) or "none"
    return "\n".join(
        [*lines, "", f"{len(imports)} folders, {count} imports. Folders that reach each other: {together}."]
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


def _reached(folder: str, imports: dict[str, set[str]]) -> set[str]:
    found: set[str] = set()
    new = imports.get(folder, set())
    while new:
        found |= new
        new = {other for name in new for other in imports.get(name, set())} - found
    return found


if __name__ == "__main__":
    print(table())
