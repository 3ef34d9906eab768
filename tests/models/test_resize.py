"""Vocabularies and task heads of another size than config.json, or the caller, has."""

import jax
import numpy as np
import pytest
from support import all_but_slow

from peftjax.core.errors import PeftError
from peftjax.models.family import read_labels
from peftjax.models.load import lacking, load
from peftjax.models.save import save
from tests.models.test_families import GPT2, TEXT
from tests.models.test_shared_tables import edit
from tests.models.test_t5 import VALUES

MODELS = {
    "llama": (None, "causal_lm"),
    "gpt2": ({"model_type": "gpt2", **GPT2}, "causal_lm"),
    "t5": ({**VALUES, "tie_word_embeddings": False}, "seq2seq_lm"),
    "bert": ({"model_type": "bert", **TEXT}, "masked_lm"),
}


@pytest.fixture(params=all_but_slow(MODELS, ("llama", "t5")))
def saved(request, tmp_path, decoders, random_decoder):
    values, head = MODELS[request.param]
    model, params = random_decoder(values or decoders["llama2"], head)
    save(tmp_path, model, params)
    return model, params, tmp_path


def test_the_vocabulary_is_as_large_as_the_files_table(saved, caplog):
    model, params, folder = saved
    edit(folder, dict, vocab_size=model.config.vocab_size - 6)
    again, loaded = load(folder, head=model.head_name)
    assert again.config.vocab_size == model.config.vocab_size
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert f"has {model.config.vocab_size} rows: the file's are used" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("change", [3, -3])
def test_a_vocabulary_is_resized_on_request(change, saved, tmp_path):
    model, params, folder = saved
    size = model.config.vocab_size
    again, loaded = load(folder, head=model.head_name, vocab_size=size + change)
    table, wanted = loaded["embed"]["word"]["embedding"], np.asarray(params["embed"]["word"]["embedding"])
    assert table.shape == (size + change, wanted.shape[1])
    np.testing.assert_array_equal(table[:size], wanted[: size + change])
    np.testing.assert_allclose(table[size:], np.tile(wanted.mean(0), (max(change, 0), 1)), rtol=1e-5)
    shapes = jax.tree.map(np.shape, again.shapes)
    assert jax.tree.map(np.shape, loaded) == shapes
    save(tmp_path / "resized", again, loaded)
    third = load(tmp_path / "resized", head=model.head_name)
    assert third[0].config.vocab_size == size + change
    jax.tree.map(np.testing.assert_array_equal, third[1], loaded)


@pytest.mark.parametrize("size", [0, -1, 10**7, 2.5, True])
def test_a_vocabulary_of_no_sensible_size_is_refused(size, saved):
    model, _, folder = saved
    with pytest.raises(PeftError, match="vocab_size must be from 1 to 5,000,000"):
        load(folder, head=model.head_name, vocab_size=size)


CLASSIFIERS = {"bert": ({"model_type": "bert", **TEXT}, 2), "roberta": ({"model_type": "roberta", **TEXT}, 2),
               "t5": (VALUES, 2), "llama": (None, 2)}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", CLASSIFIERS)
def test_a_classifier_of_another_size_is_drawn_on_request_alone(
    case, tmp_path, decoders, random_decoder, caplog
):
    values, _ = CLASSIFIERS[case]
    model, params = random_decoder(values or decoders["llama2"], "classifier")
    save(tmp_path, model, params)
    options = {"head": "classifier", "num_labels": 3, "key": jax.random.key(0)}
    with pytest.raises(PeftError, match=r"has shape \[2(, .*)?\]; .*option redraw_head=True"):
        load(tmp_path, **options)
    again, loaded = load(tmp_path, redraw_head=True, **options)
    specs = again.shapes
    assert jax.tree.map(np.shape, loaded) == jax.tree.map(np.shape, specs)
    assert "drawn at random" in caplog.text
    jax.tree.map(np.testing.assert_array_equal, loaded["blocks"], params["blocks"])
    if case == "roberta":  # its first layer has the size it had
        np.testing.assert_array_equal(loaded["head"]["dense"]["kernel"], params["head"]["dense"]["kernel"])
    assert lacking(tmp_path, again)
    assert not lacking(tmp_path, model)
    same = load(tmp_path, head="classifier", redraw_head=True)[1]
    jax.tree.map(np.testing.assert_array_equal, same, params)


def test_num_labels_alone_names_the_labels():
    assert read_labels({"num_labels": 3}) == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert read_labels({"num_labels": None}) == ("LABEL_0", "LABEL_1")
