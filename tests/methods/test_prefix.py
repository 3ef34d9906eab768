"""Prefix tuning and MAM: what the prefix is, what sees it, and what it is joined with."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import KEY, assert_close
from tiny_decoder import PROMPTS, make_decoder, padded
from tiny_models import BLOCKS, WIDTH, moved, tiny
from tiny_t5 import make, token_batch

import peftjax as pj
from peftjax.core import tree
from peftjax.core.errors import PeftError

MODEL = tiny("backbone")
OPTIONS = {"length": 3, "mlp_size": 4}


def run_of(method, trained, model=MODEL.forward, params=MODEL.params, batch=MODEL.batch):
    frozen, _ = method.init(KEY, params)
    return pj.adapt(method.model(model))(method.apply(frozen, trained), batch)


def trained_of(method, params=MODEL.params, seed=0):
    return moved(method.init(KEY, params)[1], seed)


def states(trained, batch, model, params):
    """The states of a decoder after the blocks, with a prefix."""
    method = pj.prefix(length=len(jax.tree.leaves(trained)[0][0]), mlp_size=None)
    return run_of(method, trained, dataclasses.replace(model, head=_Nothing()), params, batch)


@dataclasses.dataclass(frozen=True)
class _Nothing:
    """A head that gives the states."""

    def clone(self, **_):
        return self

    def apply(self, variables, hidden, *_, **__):
        return hidden


@pytest.fixture(scope="module")
def decoder():
    return make_decoder()


@pytest.mark.slow
def test_the_keys_and_values_of_a_prompt_are_the_prompt(decoder):
    """Grouped heads, rotated keys, a scan: the prefix does in each layer what the tokens did."""
    model, params = decoder
    tokens = np.array(PROMPTS[0], np.int32)
    trained = pj.prefix_of(model, params, tokens[:4])
    assert trained["blocks"]["prefix"]["attention"]["keys"].shape == (3, 4, 16)
    got = states(trained, {"input_ids": tokens[None, 4:]}, model, params)
    whole = dataclasses.replace(model, head=_Nothing())(params, {"input_ids": tokens[None]})
    assert_close(got, whole[:, 4:])


def test_a_prompt_of_a_model_without_rotation_is_refused():
    with pytest.raises(PeftError, match="prefix_of: places before the first need rotary positions"):
        pj.prefix_of(tiny("encoder").forward, tiny("encoder").params, [1, 2])


@pytest.fixture(scope="module")
def prefixed(decoder):
    return trained_of(pj.prefix(length=4, mlp_size=None, init_std=0.5), decoder[1])


@pytest.mark.slow
def test_padding_on_either_side_changes_no_token(decoder, prefixed):
    model, params = decoder
    alone = states(prefixed, {"input_ids": np.array(PROMPTS[1:2])}, model, params)
    for side, place in (("left", slice(4, 7)), ("right", slice(0, 3))):
        batch = padded(PROMPTS[:2], side)
        batch["position_ids"] = np.maximum(np.cumsum(batch["attention_mask"], 1) - 1, 0)
        got = states(prefixed, batch, model, params)[1:2, place]
        assert_close(got, alone)


@pytest.mark.slow
def test_every_segment_of_a_packed_row_sees_it(decoder, prefixed):
    model, params = decoder
    row = {
        "input_ids": np.array([PROMPTS[0] + PROMPTS[2]]),
        "segment_ids": np.array([[1] * 7 + [2] * 5]),
        "position_ids": np.array([[*range(7), *range(5)]]),
    }
    packed = states(prefixed, row, model, params)
    alone = [states(prefixed, {"input_ids": np.array([PROMPTS[n]])}, model, params) for n in (0, 2)]
    assert_close(packed, jnp.concatenate(alone, axis=1))
    assert (
        float(jnp.abs(packed - states(jax.tree.map(jnp.zeros_like, prefixed), row, model, params)).max())
        > 0.1
    )


@pytest.mark.slow
@pytest.mark.parametrize("make_method", [pj.prefix, pj.mam], ids=lambda make: make.__name__)
def test_without_the_mlp_it_is_the_same_and_smaller(make_method):
    method = make_method(**OPTIONS, dropout=0.1)
    trained = trained_of(method)
    again, plain = pj.without_mlp(method, trained)
    assert again.config == {**method.config, "mlp_size": None}
    fresh = again.init(KEY, MODEL.params)[1]
    assert jax.tree.map(jnp.shape, plain) == jax.tree.map(jnp.shape, fresh)
    assert sum(leaf.size for leaf in jax.tree.leaves(plain["blocks"]["prefix"])) == 2 * BLOCKS * 3 * WIDTH
    np.testing.assert_array_equal(run_of(again, plain), run_of(method, trained))


def test_a_method_without_a_prefix_has_no_mlp():
    with pytest.raises(PeftError, match="without_mlp: lora has no MLP; give prefix or mam"):
        pj.without_mlp(pj.lora(), {})


@pytest.mark.slow
def test_mam_without_a_prefix_is_the_parallel_adapter_and_without_an_adapter_the_prefix():
    for mam, other in (
        (pj.mam(length=0, size=3), pj.parallel_adapter(size=3)),
        (pj.mam(**OPTIONS, size=0), pj.prefix(**OPTIONS)),
    ):
        trained = trained_of(other)
        assert jax.tree.structure(mam.init(KEY, MODEL.params)[1]) == jax.tree.structure(trained)
        np.testing.assert_array_equal(run_of(mam, trained), run_of(other, trained))


@pytest.mark.slow
def test_mam_is_both_in_a_chain():
    mam, chain = pj.mam(**OPTIONS, size=3), pj.chain(pj.prefix(**OPTIONS), pj.parallel_adapter(size=3))
    trained = trained_of(mam)
    parts = {"prefix": "prefix", "parallel_adapter": "feed_forward"}
    apart = {name: {"blocks": {part: trained["blocks"][part]}} for name, part in parts.items()}
    assert_close(run_of(chain, apart), run_of(mam, trained))


@pytest.mark.slow
@pytest.mark.parametrize("layers", [None, [1]])
def test_two_prefixes_in_a_chain_are_one_that_is_longer(layers):
    plain = {"mlp_size": None, "init_std": 0.5}
    first = pj.prefix(length=2, layers=layers, **plain)
    second = pj.mam(length=3, size=0, **plain)
    chain, own = pj.chain(first, second), trained_of(first)
    both = {"prefix": own, "mam": trained_of(second, seed=1)}
    got = run_of(chain, both)
    if layers is not None:
        assert float(jnp.abs(got - run_of(second, both["mam"])).max()) > 1e-3
        return
    joined = jax.tree.map(lambda *pair: jnp.concatenate(pair, axis=1), both["prefix"], both["mam"])
    assert_close(got, run_of(pj.prefix(length=5, **plain), joined))


@pytest.mark.slow
def test_layers_that_are_left_out_have_no_numbers_and_stay_as_they_were():
    whole, part = pj.prefix(length=3, mlp_size=None), pj.prefix(length=3, mlp_size=None, layers=[1])
    trained = trained_of(part)
    assert {leaf.shape for leaf in jax.tree.leaves(trained)} == {(1, 3, WIDTH)}
    of_all = jax.tree.map(lambda leaf: jnp.concatenate([leaf] * BLOCKS), trained)
    model, adapted = MODEL.forward, whole.model(MODEL.forward)
    hidden, context = model.run_embed(MODEL.params, MODEL.batch)
    params = whole.apply(whole.init(KEY, MODEL.params)[0], of_all)
    for number in range(BLOCKS):
        one, weights = (adapted, params) if number == 1 else (model, MODEL.params)
        layer = jax.tree.map(lambda leaf, n=number: leaf[n], one.layers(weights))
        hidden = one.run_layer(layer, hidden, context)
    assert_close(run_of(part, trained), model.run_head(MODEL.params, hidden, context))


def test_dropout_is_of_keys_and_values_and_needs_a_key():
    method = pj.prefix(**OPTIONS, dropout=0.5)
    frozen, fresh = method.init(KEY, MODEL.params)
    dropped = method.apply(frozen, fresh, key=KEY)["blocks"]["prefix"]["prefix"]["attention"]
    whole = method.apply(frozen, fresh)["blocks"]["prefix"]["prefix"]["attention"]
    for name in ("keys", "values"):
        kept = np.asarray(dropped[name] != 0)
        assert 0.25 < kept.mean() < 0.75
        assert_close(np.where(kept, dropped[name], 0), np.where(kept, 2 * whole[name], 0))
    assert ((dropped["keys"] != 0) != (dropped["values"] != 0)).any()


def test_zeros_are_not_the_base():
    """They take a share of the softmax, which the values then lack."""
    method = pj.prefix(length=3, mlp_size=None, init_std=0.0)
    zeros = method.init(KEY, MODEL.params)[1]
    assert not any(leaf.any() for leaf in jax.tree.leaves(zeros))
    assert float(jnp.abs(run_of(method, zeros) - MODEL.forward(MODEL.params, MODEL.batch)).max()) > 1e-3


@pytest.mark.parametrize(
    ("make_method", "options", "text"),
    [
        (pj.prefix, {"length": 0}, "prefix: the length of the prefix must be positive, got 0"),
        (pj.prefix, {"mlp_size": 0}, "prefix: mlp_size must be positive, got 0"),
        (pj.prefix, {"init_std": -1.0}, "prefix: init_std must be 0 or more, got -1.0"),
        (pj.mam, {"prefix_dropout": 1.0}, r"mam: the dropout of the prefix must be in \[0, 1\), got 1.0"),
        (pj.mam, {"length": 0, "size": 0}, "mam: length and size are both 0"),
    ],
)
def test_a_setting_out_of_range(make_method, options, text):
    with pytest.raises(PeftError, match=text):
        make_method(**options)


@pytest.mark.slow
def test_an_encoder_decoder_has_one_in_all_three_attentions():
    model, params = make("none")
    method, batch = pj.mam(**OPTIONS, size=3), token_batch()
    frozen, trainable = method.init(KEY, params)
    assert set(trainable["blocks"]["prefix"]) == {"attention", "cross_attention"}
    assert set(trainable["encoder"]["prefix"]) == {"attention"}
    trained = moved(trainable)
    run = jax.jit(lambda trained, batch: method.model(model)(method.apply(frozen, trained), batch))
    for path, grad in tree.named_leaves(
        jax.jit(jax.grad(lambda t: jnp.sum(jnp.sin(run(t, batch)))))(trained)
    ).items():
        assert float(jnp.abs(grad).max()) > 0, path
    # The padding of the texts is seen by none, and the prefix by all.
    other = {**batch, "input_ids": np.where(batch["attention_mask"], batch["input_ids"], 7)}
    np.testing.assert_array_equal(run(trained, batch), run(trained, other))
