"""Trained rows of a lookup table, and the output layer tied to it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import KEY, assert_close
from tiny_models import moved, tiny

import peftjax as pj

MODEL = tiny("words")
METHOD = pj.rows([1, 3])
FROZEN, FRESH = METHOD.init(KEY, MODEL.params)


def table(params):
    return np.asarray(params["words"]["embedding"])


def test_only_the_chosen_rows_change_and_the_others_are_bit_equal():
    values = moved(FRESH)
    before, after = table(MODEL.params), table(METHOD.merge(FROZEN, values))
    np.testing.assert_array_equal(np.delete(after, [1, 3], 0), np.delete(before, [1, 3], 0))
    np.testing.assert_array_equal(after[[1, 3]], values["words/embedding"]["values"])


def test_a_lookup_of_the_other_rows_is_bit_equal():
    weight = METHOD.apply(FROZEN, moved(FRESH))["words"]["embedding"]
    tokens = jnp.array([[0, 2], [4, 10]])
    out = pj.adapt(lambda w, tokens: w[tokens])(weight, tokens)
    np.testing.assert_array_equal(out, table(MODEL.params)[tokens])


def test_the_tied_output_follows_in_value_and_gradient():
    def adapted(values):
        run = pj.adapt(MODEL.forward)
        return jnp.sum(jnp.sin(run(METHOD.apply(FROZEN, values), MODEL.batch)))

    def merged(values):
        return jnp.sum(jnp.sin(MODEL.forward(METHOD.merge(FROZEN, values), MODEL.batch)))

    got, want = (jax.jit(jax.value_and_grad(loss))(moved(FRESH)) for loss in (adapted, merged))
    assert_close(got, want)


@pytest.mark.slow
def test_beside_lora_on_the_same_table():
    method = pj.chain(METHOD, pj.lora(rank=2, targets=["words", "up"]))
    frozen, fresh = method.init(KEY, MODEL.params)
    trained = moved(fresh)
    out = pj.adapt(MODEL.forward)(method.apply(frozen, trained), MODEL.batch)
    assert_close(out, MODEL.forward(method.merge(frozen, trained), MODEL.batch))


def test_a_whole_table_is_never_trained():
    assert jax.tree.map(jnp.shape, FRESH) == {"words/embedding": {"values": (2, 8)}}
