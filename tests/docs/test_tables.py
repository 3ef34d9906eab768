"""The tables of README.md are those that the registry and the recorded results give."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"


@pytest.fixture
def generator(monkeypatch):
    """The programs of `docs/`."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import generate

    yield generate
    for name in ("generate", "tables", "measured", "docstrings"):
        sys.modules.pop(name, None)


def test_the_readme_has_the_tables_that_are_generated(generator):
    text = README.read_text(encoding="utf-8")
    assert generator.tables.with_tables(text) == text, "run `python docs/tables.py`"


def test_the_readme_is_short(generator):
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


def test_every_entry_of_the_registry_has_a_page_with_its_options(generator):
    for name, info in generator.tables.entries().items():
        page = generator.method_page(name, "## Notes of it\n")
        assert info.trains.replace("|", "\\|") in page
        assert f"pj.{name}(" in page
        assert page.rstrip().endswith("### Notes of it")
    index = generator.methods_index()
    assert all(f"[`{name}`]({name}.md)" in index for name in generator.tables.entries())


def test_the_notes_are_of_methods_that_are_there(generator):
    notes = {path.stem for path in (ROOT / "docs" / "methods").glob("*.md")}
    assert notes <= generator.tables.entries().keys()


def test_a_docstring_is_read_into_its_parts(generator):
    def some(a: int, *, b: "float" = 2.0) -> None:
        """What it does.

            y = a·b_

        Args:
            a: the first,
                on two lines.
            b: the | second.

        Raises:
            PeftError: always.
        """

    docstrings = generator.docstrings
    found = docstrings.read(some)
    assert found.text == "What it does.\n\n    y = a·b_"
    assert found.entries("Args") == {"a": "the first, on two lines.", "b": "the | second."}
    assert docstrings.signature(some) == "some(\n    a: int,\n    b: float = 2.0,\n)"
    lines = (some.__doc__ or "").replace("\n        ", "\n").splitlines()
    docstrings.markdown_to_rst(None, "function", "some", some, {}, lines)
    assert lines[2:5] == ["::", "", "    y = a·b_"]
