"""The code of README.md, of the guides and of the methods' notes runs as it stands, a page at a time."""

import doctest
import importlib
import re
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
import tiny_decoder_folder
from support import quick_at

import peftjax as pj

ROOT = Path(__file__).parents[2]
EXAMPLE = re.compile(r"^ *>>> (?!.*doctest: \+SKIP)", re.MULTILINE)
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
PAGES = {
    path.relative_to(ROOT).as_posix(): path
    for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
    if not path.is_relative_to(ROOT / "docs/reference") and BLOCK.search(path.read_text(encoding="utf-8"))
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder in which `LLAMA_FOLDER` is a tiny Llama with its tokenizer."""
    (tmp_path / "LLAMA_FOLDER").mkdir()
    tiny_decoder_folder.save_decoder(tmp_path / "LLAMA_FOLDER")
    monkeypatch.chdir(tmp_path)
    # A page that shows how to register a method adds it for itself alone.
    monkeypatch.setattr(pj.METHODS, "_known", dict(pj.METHODS._known))
    return tmp_path


@pytest.mark.slow  # what README.md's code learns is a quick test below
@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs(page, folder):
    text = PAGES[page].read_text(encoding="utf-8")
    names: dict = {"__name__": page}
    for block in BLOCK.finditer(text):
        line = text[: block.start(1)].count("\n")
        # As many empty lines before it, so that an error names the line of the page.
        exec(compile("\n" * line + block[1], str(PAGES[page]), "exec"), names)


def test_the_example_of_the_readme_learns_and_both_loops_agree(folder):
    text, given = PAGES["README.md"].read_text(encoding="utf-8"), "method.init(jax.random.key(2), params)"
    assert given in text
    # `start` draws the adapter from one half of its key.
    text = text.replace(given, "method.init(jax.random.split(jax.random.key(2))[0], params)")
    names: dict = {}
    for block in BLOCK.findall(text):
        exec(block, names)
    assert float(names["value"]) < 1.0  # ten classes at random: 2.3
    assert jax.tree.structure(names["dense"]) == jax.tree.structure(names["params"])
    ours, by_hand = names["state"].trainable, names["trainable"]
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(by_hand), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def modules_with_examples():
    """The modules of the package with an example that is not skipped (it names a folder of the reader's)."""
    files = sorted(
        path for path in (ROOT / "peftjax").rglob("*.py") if EXAMPLE.search(path.read_text("utf-8"))
    )
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files]
    return [name.removesuffix(".__init__") for name in names]


@pytest.mark.parametrize("name", quick_at(modules_with_examples(), every=3))
def test_the_examples_of_docstrings_say_what_comes_out(name):
    options = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    module = importlib.import_module(name)
    names = {"jax": jax, "jnp": jax.numpy, "optax": optax, "pj": pj}
    failed, tried = doctest.testmod(module, optionflags=options, extraglobs=names)
    assert failed == 0
    assert tried > 0
