"""Ids outside a table, such as a padding token that was added to the tokenizer alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import all_but_slow

import peftjax as pj
from peftjax.core.errors import PeftError
from peftjax.generation.prompt import left_padded
from peftjax.train.data.batches import TokenizedSplit
from peftjax.train.data.batches import make_batch as classified_batch
from tests.models.test_families import GPT2, OPT, TEXT
from tests.models.test_t5 import VALUES

MODELS = {
    "llama": (None, "causal_lm"),
    "gpt2": ({"model_type": "gpt2", **GPT2}, "causal_lm"),
    "opt": ({"model_type": "opt", **OPT}, "causal_lm"),
    "bert": ({"model_type": "bert", **TEXT}, "masked_lm"),
    "t5": (VALUES, "seq2seq_lm"),
}


@pytest.fixture(params=all_but_slow(MODELS, ("gpt2", "t5")))
def beyond(request, decoders, random_decoder):
    """(model, parameters, a batch, the same with ids outside the vocabulary under its mask)."""
    values, head = MODELS[request.param]
    model, params = random_decoder(values or decoders["llama2"], head)
    ids, mask = np.array([[5, 6, 7, 2, 2], [5, 6, 7, 8, 9]]), np.array([[1, 1, 1, 0, 0], [1] * 5])
    size = model.config.vocab_size
    outside = np.where(mask, ids, [0, 0, 0, size, -100])
    batch = {"input_ids": ids, "attention_mask": mask}
    other = {**batch, "input_ids": outside}
    if head == "seq2seq_lm":
        batch |= {"decoder_input_ids": ids, "decoder_attention_mask": mask}
        other |= {"decoder_input_ids": outside, "decoder_attention_mask": mask}
    return model, params, batch, other


def test_masked_ids_outside_the_vocabulary_change_no_output(beyond):
    model, params, batch, other = beyond
    real = batch["attention_mask"] != 0
    wanted, found = (np.asarray(jnp.asarray(model(params, b)))[real] for b in (batch, other))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_an_id_outside_the_vocabulary_that_counts_is_named(beyond):
    model, params, _, other = beyond
    size = model.config.vocab_size
    with pytest.raises(PeftError, match=rf"input_ids has the id {size}; the model's table has {size} rows"):
        model(params, {name: ids for name, ids in other.items() if "mask" not in name})
    for wrong in (size, -1):  # traced, it cannot be named, and gives no number instead of another row's
        batch = {name: np.full_like(ids, wrong) for name, ids in other.items() if "mask" not in name}
        hidden = jax.jit(lambda p, b: model.run_embed(p, b)[0])(params, batch)
        assert bool(jnp.isnan(hidden[..., 0]).all())


@pytest.mark.slow
def test_generate_reads_padding_that_the_model_lacks(decoders, random_decoder):
    model, params = random_decoder(decoders["llama2"])
    mask = np.array([[0, 0, 1, 1], [1, 1, 1, 1]])
    ids = np.array([[3, 3, 7, 8], [4, 5, 6, 7]])
    batch = {"input_ids": np.where(mask, ids, 61), "attention_mask": mask}
    assert left_padded(batch).ids.tolist() == [[0, 0, 7, 8], [4, 5, 6, 7]]
    tokens = pj.generate(model, params, batch, max_new_tokens=3).tokens
    wanted = pj.generate(model, params, {**batch, "input_ids": ids}, max_new_tokens=3).tokens
    np.testing.assert_array_equal(tokens, wanted)
    with pytest.raises(PeftError, match="has the id 61; the model's table has 61 rows"):
        pj.generate(model, params, {"input_ids": batch["input_ids"]}, max_new_tokens=3)


def test_a_row_that_only_fills_a_batch_begins_with_a_token_of_the_texts():
    split = TokenizedSplit(
        ids=np.array([5, 6, 7], np.int32),
        starts=np.array([0, 1, 3]),
        labels=np.array([0, 1], np.int32),
        max_length=4,
        pad_id=99,
    )
    batch = classified_batch(split, [1], 2)
    assert batch["input_ids"][batch["attention_mask"] != 0].tolist() == [6, 7, 6]
