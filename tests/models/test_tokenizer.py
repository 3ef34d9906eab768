import json

import pytest

from peftjax.errors import PeftError
from peftjax.models.tokenizer import load_tokenizer

tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is in peftjax[train]")


@pytest.fixture
def folder(tmp_path):
    """A word tokenizer with BERT's special tokens and no padding token of a usual name."""
    words = ["[UNK]", "[CLS]", "[SEP]", "<nothing>", "a", "b", "c"]
    vocab = {word: i for i, word in enumerate(words)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(json.dumps({"pad_token": {"content": "<nothing>"}}))
    return tmp_path


def test_encode_truncates_and_keeps_special_tokens(folder):
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode(["a b c", "b ?"], max_length=4) == [[1, 4, 5, 2], [1, 5, 0, 2]]
    assert tokenizer.encode([], max_length=4) == []
    assert tokenizer.vocab_size == 7


def test_no_room_for_text_is_an_error(folder):
    with pytest.raises(PeftError, match=r"max_length 2 leaves no room"):
        load_tokenizer(folder).encode(["a"], max_length=2)


def test_pad_id_comes_from_the_settings_beside_the_file(folder):
    assert load_tokenizer(folder).pad_id == 3


def test_no_padding_token_is_an_error(folder):
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(PeftError, match=r"no padding token"):
        load_tokenizer(folder)


def test_absent_file_is_named(tmp_path):
    with pytest.raises(PeftError, match=r"no tokenizer at .*tokenizer.json"):
        load_tokenizer(tmp_path)


def test_corrupt_file_is_named(folder):
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(PeftError, match=r"tokenizer.json is not a tokenizer"):
        load_tokenizer(folder)
