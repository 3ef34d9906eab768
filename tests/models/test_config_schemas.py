"""Settings of another type or out of range in config.json: one sentence that names file and setting."""

import json

import pytest

from peftjax.core.errors import PeftError
from peftjax.io.safetensors import find_tensors
from peftjax.models.families import FAMILIES, read_family
from peftjax.models.load import load
from tests.models.test_families import GPT2, IMAGE, OPT, TEXT
from tests.models.test_t5 import VALUES


@pytest.fixture(scope="session")
def contents(decoders):
    """The content of a right `config.json` of each family."""
    own = {values["model_type"]: values for values in decoders.values()}
    own |= {name: {"model_type": name, **TEXT} for name in ("bert", "roberta", "xlm-roberta")}
    own |= {"vit": {"model_type": "vit", **IMAGE}, "gpt2": {"model_type": "gpt2", **GPT2}}
    return own | {"opt": {"model_type": "opt", **OPT}, "t5": VALUES, "mt5": {**VALUES, "model_type": "mt5"}}


def refused(folder, values):
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(PeftError) as error:
        load(folder)
    return str(error.value)


@pytest.mark.parametrize("name", FAMILIES)
def test_no_number_of_another_type_ends_in_a_traceback(name, contents, tmp_path):
    for field, right in contents[name].items():
        if isinstance(right, bool) or not isinstance(right, int | float):
            continue
        for wrong in ("1e-6", [1], {"a": 1}, float("nan"), 10**30, -(10**30)):
            assert f"'{field}" in refused(tmp_path, {**contents[name], field: wrong})


@pytest.mark.parametrize("name", FAMILIES)
def test_sizes_beyond_any_checkpoint_are_refused_before_memory_is_asked_for(name, contents, tmp_path):
    sizes = {"vocab_size": 10**10, "num_hidden_layers": 10**7, "n_layer": 10**7, "num_layers": 10**7}
    for field in sizes.keys() & contents[name].keys():
        if name == "vit" and field == "vocab_size":
            continue
        assert f"'{field}': Expected `int` <= " in refused(tmp_path, {**contents[name], field: sizes[field]})


WRONG = {
    "model_type": [1],
    "architectures": 3,
    "id2label": ["a", "b"],
    "rope_scaling": [1],
    "rope_parameters": {"rope_type": "linear", "factor": "2.0"},
    "rope_theta": "10000.0",
    "initializer_range": None,
    "rms_norm_eps": "1e-6",
    "hidden_act": ["silu"],
    "tie_word_embeddings": "yes",
    "layer_types": [1, 2, 3],
}


@pytest.mark.parametrize("field", WRONG)
def test_settings_of_a_decoder_of_another_type_are_named(field, contents, tmp_path):
    assert field in refused(tmp_path, {**contents["llama"], field: WRONG[field]})


@pytest.mark.parametrize("labels", [{"a": "x"}, {"0": "x", "2": "y"}, {"0": "x", "00": "y"}, {"-1": "x"}])
def test_labels_are_numbered_from_0_on(labels, contents, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**contents["bert"], "id2label": labels}))
    family, values = read_family(tmp_path)
    with pytest.raises(PeftError, match="id2label must have the keys '0', '1'"):
        family.read_config(values)


INDEXES = [
    *("null", "[]", "{", "{}", '{"weight_map": null}', '{"weight_map": {"a": null}}', '{"weight_map": [1]}'),
    *('{"weight_map": {"a": "../b.safetensors"}}', '{"weight_map": {"a": "/etc/passwd"}}'),
]


@pytest.mark.parametrize("text", INDEXES)
def test_an_index_of_shards_that_is_none_is_named(text, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(PeftError, match=r"model\.safetensors\.index\.json"):
        find_tensors(tmp_path)


def test_a_folder_with_weights_of_another_format_says_how_to_convert_them(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(PeftError, match=r"pytorch_model\.bin is of a format .* save_pretrained"):
        find_tensors(tmp_path)


HEADERS = {
    "empty": b"",
    "longer than the file": (2**62).to_bytes(8, "little") + b"{}",
    "no JSON": (4).to_bytes(8, "little") + b"\xff\xfe{}",
    "null": (4).to_bytes(8, "little") + b"null",
    "deep": (20_000).to_bytes(8, "little") + b"[" * 20_000,
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_a_safetensors_header_that_is_none_is_named(header, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(header)
    with pytest.raises(PeftError, match=r"model\.safetensors"):
        find_tensors(tmp_path)
