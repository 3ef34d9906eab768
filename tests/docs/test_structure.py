"""The folders of the package import each other in one direction."""

from pathlib import Path

import pytest


@pytest.fixture
def structure(monkeypatch):
    """The program of `docs/` that reads the imports."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "docs"))
    import structure

    return structure


def test_no_two_folders_reach_each_other(structure):
    assert structure.cycles(structure.imports_of()) == []


def test_a_circle_is_found(structure, tmp_path):
    for folder, imported in {"one": "two", "two": "three", "three": "one", "four": "one"}.items():
        (tmp_path / "peftjax" / folder).mkdir(parents=True)
        (tmp_path / "peftjax" / folder / "file.py").write_text(f"from peftjax.{imported} import file\n")
    circle = structure.cycles(structure.imports_of(tmp_path / "peftjax"))
    assert circle == [("one", "three"), ("one", "two"), ("three", "two")]
