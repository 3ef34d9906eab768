import json

import pytest
import tiny_language as tiny

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


def test_a_decoder_pads_with_eos_and_an_encoder_does_not(tmp_path):
    tiny.save_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path, decoder=True)
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (1, 0, 1)
    with pytest.raises(PeftError, match="no padding token"):
        load_tokenizer(tmp_path)


def test_a_padding_token_that_is_named_wins_and_has_to_exist(tmp_path):
    tokenizer = tiny.tokenizer(tmp_path, settings={"pad_token": "<|eot|>"})
    assert tokenizer.pad_id == tokenizer.backend.token_to_id("<|eot|>") != tokenizer.eos_id
    with pytest.raises(PeftError, match=r"no padding token \(<gone>\)"):
        tiny.tokenizer(tmp_path, settings={"pad_token": "<gone>"})
    with pytest.raises(PeftError, match="eos_token '<gone>' that"):
        tiny.tokenizer(tmp_path, settings={"eos_token": "<gone>"})


@pytest.mark.parametrize(("given", "ids"), [(3, (1, 3)), ([4, 1, 6], (1, 4, 6)), (None, (1,))])
def test_stop_tokens_of_the_generation_settings(tmp_path, given, ids):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": given}))
    assert tiny.tokenizer(tmp_path).stop_ids == ids


def test_bad_generation_settings_are_named(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(PeftError, match="eos_token_id is '</s>'"):
        tiny.tokenizer(tmp_path)


def test_ids_without_special_tokens_and_back(tmp_path):
    tokenizer = tiny.tokenizer(tmp_path, bos=True)
    text = "the cat \u00e9 \U0001f600\n\n sat"
    (ids,) = tokenizer.token_ids([text])
    assert tokenizer.prefix_ids == (0,)
    assert not set(ids) & tokenizer.special_ids
    assert tokenizer.decode([0, *ids, 1]) == text
    assert tokenizer.decode([0, *ids, 1], skip_special_tokens=False) == f"<s>{text}</s>"
    assert tokenizer.token_ids(["</s>"]) == [[1]]


def test_chat_templates_by_name(tmp_path):
    assert tiny.tokenizer(tmp_path, settings={"chat_template": "a"}).chat_template() == "a"
    listed = [{"name": "default", "template": "b"}, {"name": "tool_use", "template": "c"}]
    tokenizer = tiny.tokenizer(tmp_path, settings={"chat_template": listed})
    assert (tokenizer.chat_template(), tokenizer.chat_template("tool_use")) == ("b", "c")
    with pytest.raises(PeftError, match="no chat template 'rag'; it has 'default', 'tool_use'"):
        tokenizer.chat_template("rag")
    with pytest.raises(PeftError, match="lacks its name"):
        tiny.tokenizer(tmp_path, settings={"chat_template": [{"name": "default"}]})
    with pytest.raises(PeftError, match="has no chat template: use"):
        tiny.tokenizer(tmp_path).chat_template()
    (tmp_path / "chat_template.jinja").write_text("d")
    assert tiny.tokenizer(tmp_path, settings={"chat_template": listed}).chat_template() == "d"
