"""Parameters that have several names in a checkpoint: output layers, tables and biases, tied or not."""

import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import all_but_slow

from peftjax.core.errors import PeftError
from peftjax.io.safetensors import find_tensors, read_tensors, write_tensors
from peftjax.models.families import FAMILIES
from peftjax.models.load import lacking, load, stored_dtypes
from peftjax.models.save import save
from tests.models.test_families import GPT2, OPT, OPT_350M, TEXT
from tests.models.test_t5 import VALUES

OUTPUTS = {
    "llama3": ("lm_head.weight", None, "causal_lm"),
    "mistral": ("lm_head.weight", None, "causal_lm"),
    "qwen2": ("lm_head.weight", None, "causal_lm"),
    "qwen3": ("lm_head.weight", None, "causal_lm"),
    "gemma": ("lm_head.weight", None, "causal_lm"),
    "gemma2": ("lm_head.weight", None, "causal_lm"),
    "gemma3": ("lm_head.weight", None, "causal_lm"),
    "gpt_oss": ("lm_head.weight", None, "causal_lm"),
    "gpt2": ("lm_head.weight", {"model_type": "gpt2", **GPT2}, "causal_lm"),
    "opt": ("lm_head.weight", {"model_type": "opt", **OPT}, "causal_lm"),
    "opt-350m": ("lm_head.weight", {"model_type": "opt", **OPT_350M}, "causal_lm"),
    "t5": ("lm_head.weight", VALUES, "seq2seq_lm"),
    "bert": ("cls.predictions.decoder.weight", {"model_type": "bert", **TEXT}, "masked_lm"),
    "roberta": ("lm_head.decoder.weight", {"model_type": "roberta", **TEXT}, "masked_lm"),
}
"""The output layer's name, the content of `config.json` (None: of `decoders`) and the head."""


def edit(folder, change, **settings):
    """The checkpoint with its tensors changed by a function, and settings of its `config.json`."""
    tensors = change(dict(read_tensors(find_tensors(folder))))
    write_tensors(folder / "model.safetensors", tensors)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


@pytest.fixture(params=all_but_slow(OUTPUTS, ("llama3", "gpt2", "t5", "bert")))
def tied(request, tmp_path, decoders, random_decoder):
    """(output layer's name, model, parameters, the folder that they were saved in), the output layer tied."""
    name, values, head = OUTPUTS[request.param]
    values = {**(values or decoders[request.param]), "tie_word_embeddings": True}
    model, params = random_decoder(values, head)
    save(tmp_path, model, params)
    return name, model, params, tmp_path


def test_an_output_layer_of_its_own_is_read_though_config_json_ties_it(tied, caplog):
    name, model, params, folder = tied
    table = params["embed"]["word"]["embedding"]
    edit(folder, lambda tensors: {**tensors, name: np.asarray(table) + 1})
    again, loaded = load(folder, head=model.head_name)
    assert not again.config.tied
    np.testing.assert_array_equal(loaded["head"]["output"]["kernel"], (np.asarray(table) + 1).T)
    assert f"config.json ties {name}" in caplog.text
    save(folder, again, loaded)  # and it stays untied
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    third = load(folder, head=model.head_name)[1]
    jax.tree.map(np.testing.assert_array_equal, third, loaded)


def test_a_copy_of_the_table_is_no_output_layer_of_its_own(tied, caplog):
    name, model, params, folder = tied
    edit(folder, lambda tensors: {**tensors, name: np.asarray(params["embed"]["word"]["embedding"])})
    again, loaded = load(folder, head=model.head_name)
    assert again.config.tied
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert "not used" not in caplog.text


def test_a_table_that_stands_under_the_output_layers_name_alone_is_read(tied):
    name, model, params, folder = tied
    own = next(w.name for w in FAMILIES[model.config.model_type].table(model) if "word" in w.path)
    edit(folder, lambda tensors: {(name if key == own else key): t for key, t in tensors.items()})
    jax.tree.map(np.testing.assert_array_equal, load(folder, head=model.head_name)[1], params)
    assert lacking(folder, model) == set()
    assert stored_dtypes(folder, model)["embed/word/embedding"] == np.float32


def test_what_no_head_reads_is_named_in_a_warning(tied, caplog):
    name, _, params, folder = tied
    edit(folder, lambda tensors: {**tensors, name: np.ones_like(params["embed"]["word"]["embedding"])})
    load(folder, head="none")
    assert f"not used from {folder}" in caplog.text
    assert name in caplog.text.partition("not used from")[2]
    assert all(record.levelno == logging.WARNING for record in caplog.records)


@pytest.mark.parametrize(
    ("kind", "prefix"), [("bert", "cls.predictions."), ("roberta", "lm_head.")], ids=["bert", "roberta"]
)
def test_the_bias_of_the_output_layer_that_is_called_wins(kind, prefix, tmp_path, random_decoder, caplog):
    model, params = random_decoder({"model_type": kind, **TEXT}, "masked_lm")
    save(tmp_path, model, params)
    other = np.arange(TEXT["vocab_size"], dtype=np.float32)
    edit(tmp_path, lambda tensors: {**tensors, f"{prefix}decoder.bias": other})
    np.testing.assert_array_equal(load(tmp_path, head="masked_lm")[1]["head"]["bias"], other)
    assert f"not used from {tmp_path}: {prefix}bias" in caplog.text


@pytest.mark.slow
def test_an_untied_output_layer_starts_as_a_copy_of_the_table_and_is_saved(tied, tmp_path):
    name, model, params, folder = tied
    untied, own = load(folder, head=model.head_name, untie=True)
    assert not untied.config.tied
    kernel = own["head"].pop("output")["kernel"]
    np.testing.assert_array_equal(kernel, params["embed"]["word"]["embedding"].T)
    if model.encoder is not None:
        np.testing.assert_array_equal(kernel.T, own["embed"].pop("decoder_word")["embedding"])
    jax.tree.map(np.testing.assert_array_equal, own, params)
    own = load(folder, head=model.head_name, untie=True)[1]
    own["head"]["output"] = {"kernel": kernel + 1}
    if model.encoder is not None:  # equal tables of the stacks are one table again
        own["embed"]["decoder_word"]["embedding"] += 2
    assert lacking(folder, untied, untie=True) == set()
    assert stored_dtypes(folder, untied, untie=True)["head/output/kernel"] == np.float32
    save(tmp_path / "apart", untied, own)
    assert json.loads((tmp_path / "apart" / "config.json").read_text())["tie_word_embeddings"] is False
    assert name in find_tensors(tmp_path / "apart")
    again, loaded = load(tmp_path / "apart", head=model.head_name)
    assert not again.config.tied
    jax.tree.map(np.testing.assert_array_equal, loaded, own)
    larger = load(folder, head=model.head_name, untie=True, vocab_size=70)[1]
    assert larger["head"]["output"]["kernel"].shape[1] == len(larger["embed"]["word"]["embedding"]) == 70


def test_a_model_that_is_untied_by_its_file_keeps_its_output_layer_under_untie(tmp_path, random_decoder):
    model, params = random_decoder({"model_type": "gpt2", **GPT2, "tie_word_embeddings": False})
    save(tmp_path, model, params)
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path, untie=True)[1], params)


def test_a_head_without_an_output_layer_is_not_untied(tmp_path, random_decoder):
    save(tmp_path, *random_decoder({"model_type": "gpt2", **GPT2}))
    with pytest.raises(
        PeftError, match=r"'none' of a gpt2 has no output layer .* heads that have: causal_lm"
    ):
        load(tmp_path, head="none", untie=True)


MADLAD = {**VALUES, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
SIDES = tuple(f"{side}.embed_tokens.weight" for side in ("encoder", "decoder"))


@pytest.mark.parametrize("names", [SIDES[1:], SIDES, SIDES[:1]], ids=["decoder", "both", "encoder"])
@pytest.mark.parametrize("head", ["seq2seq_lm", "encoder"])
def test_t5s_table_is_read_under_any_of_its_names(names, head, tmp_path, random_decoder, caplog):
    model, params = random_decoder(MADLAD, "seq2seq_lm")
    save(tmp_path, model, params)
    table = np.asarray(params["embed"]["word"]["embedding"])
    tables = dict.fromkeys(names, table)
    edit(tmp_path, lambda t: {n: x for n, x in t.items() if n != "shared.weight"} | tables)
    again, loaded = load(tmp_path, head=head)
    assert not again.config.tied
    np.testing.assert_array_equal(loaded["embed"]["word"]["embedding"], table)
    if head == "seq2seq_lm":
        jax.tree.map(np.testing.assert_array_equal, loaded, params)
        assert "not used" not in caplog.text


# What a file holds beside the rest -> the tables that transformers gives encoder, decoder and output layer.
TABLES = {
    "shared encoder": ("encoder", "shared", "shared"),
    "shared decoder": ("shared", "decoder", "shared"),
    "shared encoder decoder": ("encoder", "decoder", "shared"),
    "encoder decoder": ("encoder", "decoder", "encoder"),
    "encoder decoder lm_head": ("encoder", "decoder", "lm_head"),
    "shared lm_head": ("shared", "shared", "lm_head"),
    "decoder lm_head": ("decoder", "decoder", "lm_head"),
}
NUMBERS = {"shared": 3, "encoder": 1, "decoder": 2, "lm_head": 4}


def spelt(name):
    return f"{name}.embed_tokens.weight" if name in ("encoder", "decoder") else f"{name}.weight"


@pytest.mark.slow
@pytest.mark.parametrize("held", TABLES)
def test_tables_of_t5s_stacks_that_differ_are_each_used(held, tmp_path, random_decoder, caplog):
    model, params = random_decoder(VALUES, "seq2seq_lm")
    save(tmp_path, model, params)
    table = np.asarray(params["embed"]["word"]["embedding"])
    tables = {spelt(name): table + NUMBERS[name] for name in held.split()}
    edit(tmp_path, lambda t: {n: x for n, x in t.items() if n != "shared.weight"} | tables)
    encoder, decoder, output = (table + NUMBERS[name] for name in TABLES[held])
    for _ in range(2):  # and saved so
        again, loaded = load(tmp_path, head="seq2seq_lm")
        embed = loaded["embed"]
        np.testing.assert_array_equal(embed["word"]["embedding"], encoder)
        np.testing.assert_array_equal(embed.get("decoder_word", embed["word"])["embedding"], decoder)
        kernel = embed["word"]["embedding"].T if again.config.tied else loaded["head"]["output"]["kernel"]
        np.testing.assert_array_equal(kernel.T, output)
        assert not lacking(tmp_path, again)
        save(tmp_path, again, loaded)
    apart = TABLES[held][0] != TABLES[held][1]
    assert ("have other numbers: each stack uses its own" in caplog.text) == apart
    alone = load(tmp_path, head="encoder")[1]
    np.testing.assert_array_equal(alone["embed"]["word"]["embedding"], encoder)


@pytest.mark.slow
def test_more_layers_than_config_json_has_are_named(tmp_path, random_decoder, decoders, caplog):
    save(tmp_path, *random_decoder(decoders["llama2"]))
    edit(tmp_path, dict, num_hidden_layers=2)
    model, _ = load(tmp_path)
    assert model.num_layers == 2
    assert "model.layers.2.mlp.up_proj.weight" in caplog.text
    assert "config.json has 2 layers, and the file more" in caplog.text


@pytest.mark.slow
def test_masked_words_are_scored_by_an_output_layer_of_its_own(random_decoder):
    values = {"model_type": "bert", **TEXT}
    tied, params = random_decoder(values, "masked_lm")
    untied, own = random_decoder({**values, "tie_word_embeddings": False}, "masked_lm")
    kernel = params["embed"]["word"]["embedding"].T
    own = {**params, "head": {**params["head"], "output": {"kernel": kernel}}}
    batch = {"input_ids": jnp.array([[3, 5, 7]])}
    wanted = jnp.asarray(tied(params, batch))
    np.testing.assert_allclose(jnp.asarray(untied(own, batch)), wanted, rtol=1e-5, atol=1e-5)
