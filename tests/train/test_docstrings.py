import re
from collections import Counter

import pytest

from peftjax.core.errors import PeftError
from peftjax.train.data import docstrings


@pytest.fixture(scope="module")
def data():
    return docstrings.docstring_dataset()


@pytest.mark.slow
def test_size_and_share(data):
    total = len(data.train) + len(data.evaluation)
    assert total >= 2000
    assert len(data.label_names) == 16
    assert 0.13 < len(data.evaluation) / total <= 0.15
    assert set(data.train.labels) == set(data.evaluation.labels) == set(range(16))


@pytest.mark.slow
def test_no_text_twice_and_no_label_in_a_text(data):
    texts = data.train.texts + data.evaluation.texts
    assert len(set(texts)) == len(texts)
    names = re.compile("|".join(data.label_names), re.IGNORECASE)
    assert not [text for text in texts if names.search(text)]
    assert min(map(len, texts)) >= 20


def test_a_library_of_seventeen_packages(tmp_path, monkeypatch):
    """The sixteen largest are the labels; names are masked, copies dropped, 15 % held out."""
    names = [f"subject{chr(97 + n)}" for n in range(17)]
    for size, name in enumerate(names, 20):
        own = [f"What {100 * size + n} of {name.upper()} does for those who call it." for n in range(size)]
        texts = [*own, own[0], "A sentence that is the same in all of the packages."]
        functions = [f'def f{n}():\n    """{text}"""\n' for n, text in enumerate(texts)]
        (tmp_path / f"{name}.py").write_text("\n".join(functions))
    monkeypatch.setattr(docstrings.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    data = docstrings.docstring_dataset()
    assert data.label_names == tuple(names[1:])
    assert Counter(data.evaluation.labels) == {n: int(0.15 * (21 + n)) for n in range(16)}
    kept = Counter(data.train.labels) + Counter(data.evaluation.labels)
    assert kept == {n: 21 + n for n in range(16)}
    texts = data.train.texts + data.evaluation.texts
    numbers = [100 * size + n for size in range(21, 37) for n in range(size)]
    assert set(texts) == {f"What {number} of <name> does for those who call it." for number in numbers}


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
