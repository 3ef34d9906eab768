import json

import pytest
import tiny_language as tiny

from peftjax.core.errors import PeftError
from peftjax.text.tokenizer import load_tokenizer

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
    with pytest.raises(PeftError, match=r"generation_config.json: 'eos_token_id'.*'</s>'"):
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
    with pytest.raises(PeftError, match=r"'chat_template\[0\]'.*field `template`"):
        tiny.tokenizer(tmp_path, settings={"chat_template": [{"name": "default"}]})
    with pytest.raises(PeftError, match="has no chat template: use"):
        tiny.tokenizer(tmp_path).chat_template()
    (tmp_path / "chat_template.jinja").write_text("d")
    assert tiny.tokenizer(tmp_path, settings={"chat_template": listed}).chat_template() == "d"


def edit(folder, name, **values):
    file = folder / name
    found = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**found, **values}))


NEW = {"content": "<|new|>", "special": True}


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("added_tokens.json", {"<|new|>": 286}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"286": NEW}}),
        ("tokenizer_config.json", {"additional_special_tokens": ["<|new|>"]}),
        ("tokenizer_config.json", {"extra_special_tokens": [NEW]}),
        ("tokenizer_config.json", {"image_token": "<|new|>"}),
        ("special_tokens_map.json", {"additional_special_tokens": ["<|new|>"]}),
        ("special_tokens_map.json", {"mask_token": "<|new|>"}),
    ],
)
def test_a_token_that_only_a_file_beside_tokenizer_json_names_is_one_id(tmp_path, file, values):
    size = tiny.tokenizer(tmp_path).vocab_size
    values = json.loads(json.dumps(values).replace("286", str(size)))
    edit(tmp_path, file, **values)
    tokenizer = load_tokenizer(tmp_path, decoder=True)
    (ids,) = tokenizer.token_ids(["the<|new|>cat"])
    assert size in ids
    assert tokenizer.decode([size], skip_special_tokens=False) == "<|new|>"
    assert tokenizer.vocab_size == size + 1
    assert (size in tokenizer.special_ids) == (file != "added_tokens.json")


def test_an_added_token_whose_id_is_not_the_next_is_an_error(tmp_path):
    size = tiny.tokenizer(tmp_path).vocab_size
    edit(tmp_path, "added_tokens.json", **{"<|new|>": size + 5})
    with pytest.raises(PeftError, match=f"the id {size + 5}, but the next free one is {size};"):
        load_tokenizer(tmp_path, decoder=True)


def test_the_older_file_wins_unless_the_settings_list_the_added_tokens(tmp_path):
    tiny.save_tokenizer(tmp_path)
    edit(tmp_path, "special_tokens_map.json", eos_token="<|eot|>", pad_token="<s>")
    tokenizer = load_tokenizer(tmp_path, decoder=True)
    assert (tokenizer.special_tokens["eos_token"], tokenizer.pad_id) == ("<|eot|>", 0)
    edit(tmp_path, "tokenizer_config.json", added_tokens_decoder={"1": {"content": "</s>", "special": True}})
    tokenizer = load_tokenizer(tmp_path, decoder=True)
    assert (tokenizer.special_tokens["eos_token"], tokenizer.pad_id) == ("</s>", 1)


def test_a_named_padding_token_wins_over_the_padding_of_tokenizer_json(folder):
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_padding(pad_id=4, pad_token="a")
    backend.save(str(folder / "tokenizer.json"))
    assert load_tokenizer(folder).pad_id == 3
    (folder / "tokenizer_config.json").unlink()
    assert load_tokenizer(folder).pad_id == 4


@pytest.fixture
def bert(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "Hello", "cafe", "café", "中", "中文"]
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece({word: i for i, word in enumerate(words)}))
    backend.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    backend.save(str(tmp_path / "tokenizer.json"))
    edit(tmp_path, "config.json", model_type="bert")
    return tmp_path


@pytest.mark.parametrize(
    ("settings", "ids"),
    [
        ({}, [2, 5, 7, 9, 1, 3]),
        ({"do_lower_case": False}, [2, 6, 8, 9, 1, 3]),
        ({"strip_accents": False}, [2, 5, 8, 9, 1, 3]),
        ({"do_lower_case": False, "strip_accents": True}, [2, 6, 7, 9, 1, 3]),
        ({"tokenize_chinese_chars": False}, [2, 5, 7, 10, 3]),
    ],
)
def test_berts_own_settings_win_over_tokenizer_json(bert, settings, ids):
    edit(bert, "tokenizer_config.json", **settings)
    assert load_tokenizer(bert).encode(["Hello café 中文"], 16) == [ids]


def test_the_prefix_is_found_where_the_letter_a_is_nothing(tmp_path):
    tiny.save_tokenizer(tmp_path, bos=True)
    file = tmp_path / "tokenizer.json"
    backend = tokenizers.Tokenizer.from_file(str(file))
    backend.normalizer = tokenizers.normalizers.Replace("a", "")
    backend.save(str(file))
    assert load_tokenizer(tmp_path, decoder=True).prefix_ids == (0,)


@pytest.mark.parametrize(
    ("config", "ids"),
    [
        ({"eos_token_id": [1, 4]}, (1, 4)),
        ({"eos_token_id": 6}, (1, 6)),
        ({"text_config": {"eos_token_id": [5]}}, (1, 5)),
    ],
)
def test_stop_tokens_of_the_model_where_no_generation_settings_are(tmp_path, config, ids):
    edit(tmp_path, "config.json", **config)
    assert tiny.tokenizer(tmp_path).stop_ids == ids
    edit(tmp_path, "generation_config.json", eos_token_id=[3])
    assert tiny.tokenizer(tmp_path).stop_ids == (1, 3)


@pytest.mark.parametrize(
    ("file", "values", "says"),
    [
        ("tokenizer_config.json", {"eos_token": 5}, "tokenizer_config.json: 'eos_token'"),
        ("tokenizer_config.json", {"eos_token": {}}, "tokenizer_config.json: 'eos_token'"),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"x": NEW}},
            "tokenizer_config.json: .*added_tokens",
        ),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"1": 5}},
            "tokenizer_config.json: .*added_tokens",
        ),
        ("tokenizer_config.json", {"do_lower_case": "yes"}, "'do_lower_case'"),
        ("tokenizer_config.json", {"chat_template": 5}, "'chat_template'"),
        ("tokenizer_config.json", {"extra_special_tokens": [1]}, "extra_special_tokens"),
        ("special_tokens_map.json", {"pad_token": [1]}, "special_tokens_map.json: 'pad_token'"),
        ("added_tokens.json", {"x": "1"}, "added_tokens.json"),
        ("added_tokens.json", {"x": -1}, "added_tokens.json"),
        ("config.json", {"eos_token_id": [1, None]}, "config.json: 'eos_token_id"),
        ("config.json", {"tokenizer_class": 3}, "config.json: 'tokenizer_class'"),
        ("generation_config.json", {"eos_token_id": True}, "generation_config.json: 'eos_token_id'"),
    ],
)
def test_a_field_of_another_type_is_named(tmp_path, file, values, says):
    tiny.save_tokenizer(tmp_path)
    edit(tmp_path, file, **values)
    with pytest.raises(PeftError, match=says):
        load_tokenizer(tmp_path, decoder=True)


def test_a_text_that_the_tokenizer_cannot_encode_is_an_error(tmp_path):
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0}, unk_token="[UNK]"))
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(PeftError, match="cannot encode the text"):
        load_tokenizer(tmp_path).token_ids(["hello"])
