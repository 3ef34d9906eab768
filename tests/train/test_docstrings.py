import re

import pytest

from peftjax.errors import PeftError
from peftjax.train.data import docstrings


@pytest.fixture(scope="module")
def data():
    return docstrings.docstring_dataset()


def test_size_and_share(data):
    total = len(data.train) + len(data.evaluation)
    assert total >= 2000
    assert len(data.label_names) == 16
    assert 0.13 < len(data.evaluation) / total <= 0.15
    assert set(data.train.labels) == set(data.evaluation.labels) == set(range(16))


def test_no_text_twice_and_no_label_in_a_text(data):
    texts = data.train.texts + data.evaluation.texts
    assert len(set(texts)) == len(texts)
    names = re.compile("|".join(data.label_names), re.IGNORECASE)
    assert not [text for text in texts if names.search(text)]
    assert min(map(len, texts)) >= 20


def test_group_is_the_top_level_object(tmp_path):
    text = "A docstring that is long enough to be kept."
    (tmp_path / "pack").mkdir()
    path = tmp_path / "pack" / "mod.py"
    path.write_text(
        f'"""{text} 1"""\nclass A:\n  """{text} 2"""\n  def f(self):\n    """{text} 3"""\n'
        f'if True:\n  def g():\n    """{text}\n\n    4"""\n    def h():\n      """short"""\n'
    )
    found = docstrings.read_docstrings(path, tmp_path)
    assert [(item.text[-1], item.group, item.package) for item in found] == [
        ("1", "pack.mod", "pack"),
        ("2", "pack.mod.A", "pack"),
        ("3", "pack.mod.A", "pack"),
        ("4", "pack.mod.g", "pack"),
    ]


def test_distinct_drops_texts_of_two_packages():
    items = [
        docstrings.Docstring("a", "x", "x.1"),
        docstrings.Docstring("a", "x", "x.2"),
        docstrings.Docstring("b", "x", "x.2"),
        docstrings.Docstring("b", "y", "y.1"),
    ]
    assert docstrings.distinct(items) == items[:1]


def test_groups_are_whole_and_stable():
    items = [docstrings.Docstring(f"{i}", "x", f"x.g{i // 3}") for i in range(60)]
    chosen = docstrings.evaluation_groups(items, "x")
    assert chosen == docstrings.evaluation_groups(items[::-1], "x")
    assert sum(item.group in chosen for item in items) == 9


def test_a_python_without_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(docstrings.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(PeftError, match="docstrings of 0 packages"):
        docstrings.docstring_dataset()
