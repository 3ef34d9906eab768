"""The tables of README.md are those that the registry and the recorded results give."""

import re
import sys
from pathlib import Path

import pytest

import peftjax as pj

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


def test_the_pages_have_the_tables_that_are_generated(generator):
    for page in generator.tables.PAGES:
        text = page.read_text(encoding="utf-8")
        assert "<!-- end -->" in text
        assert generator.tables.with_tables(text) == text, "run `python docs/tables.py`"


def test_the_readme_is_short(generator):
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


def test_every_entry_of_the_registry_has_a_page_with_its_options(generator):
    for name, info in pj.METHODS.items():
        page = generator.method_page(name, "## Notes of it\n")
        assert info.trains.replace("|", "\\|") in page
        assert f"pj.{name}(" in page
        assert page.rstrip().endswith("\n## Notes of it")
    index = generator.methods_index()
    assert all(f"[`{name}`]({name}.md)" in index for name in pj.METHODS)


def test_the_notes_are_of_methods_that_are_there(generator):
    notes = {path.stem for path in (ROOT / "docs" / "methods").glob("*.md")}
    assert notes <= pj.METHODS.keys()


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
    assert docstrings.signature(some) == "some(\n    a: int,\n    *,\n    b: float = 2.0,\n)"
    lines = (some.__doc__ or "").replace("\n        ", "\n").splitlines()
    docstrings.markdown_to_rst(None, "function", "some", some, {}, lines)
    assert lines[2:5] == ["::", "", "    y = a·b_"]


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_the_files_that_a_page_links_to_are_there(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text(encoding="utf-8"))
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_commands_that_the_documentation_gives_are_there():
    pages = [README, *ROOT.glob("docs/guides/*.md"), *ROOT.glob("docs/results/*.md")]
    named = {
        name for page in pages for name in re.findall(r"-m\s(experiments[.\w]+)", page.read_text("utf-8"))
    }
    files = [ROOT / name.replace(".", "/") for name in named]
    assert [file for file in files if not file.with_suffix(".py").exists() and not file.is_dir()] == []
