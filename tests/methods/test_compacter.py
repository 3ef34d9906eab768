"""Compacter against the Kronecker products that it never forms, its counts, and the one A of a model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import KEY, assert_close, noisy, normal
from tiny_models import BLOCKS, WIDTH, tiny
from tiny_t5 import make, token_batch

import peftjax as pj
from peftjax.core.errors import PeftError
from peftjax.methods.bottleneck.compacter import PhmBottleneck
from peftjax.models.t5 import t5
from peftjax.models.t5_config import read_config

MODEL = tiny("backbone")
OPTIONS = {"size": 4, "order": 2, "init_std": 0.5}


@pytest.mark.parametrize(("order", "rank"), [(2, 1), (4, 3)])
def test_the_formula(order, rank):
    bottleneck = PhmBottleneck(4, activation="tanh", order=order, rank=rank)
    layer = jax.tree.map(lambda leaf: leaf[0], noisy(bottleneck.init(KEY, 1, WIDTH)))
    layer["rule"] = normal(KEY, (order,) * 3)
    u = normal(KEY, (5, WIDTH))

    def matrix(part):
        left, right = (np.asarray(layer[part][name]) for name in ("left", "right"))
        return sum(np.kron(a, s @ t) for a, s, t in zip(np.asarray(layer["rule"]), left, right))

    inner = np.tanh(np.asarray(u) @ matrix("down") + layer["down"]["bias"])
    assert_close(bottleneck.run(layer, u), inner @ matrix("up") + layer["up"]["bias"])


def test_the_start_is_the_released_codes():
    """s and t within √2 times Glorot's bound of their own sides, A of the deviation given, biases zero."""
    values = PhmBottleneck(24, order=4, rank=1).init(KEY, 6, 768)
    for part, rows, columns in (("down", 192, 6), ("up", 6, 192)):
        assert values[part]["left"].shape == (6, 4, rows, 1)
        assert values[part]["right"].shape == (6, 4, 1, columns)
        for name, size in (("left", rows), ("right", columns)):
            bound = np.sqrt(2.0) * np.sqrt(6.0 / (size + 1))
            assert 0.98 * bound < float(jnp.abs(values[part][name]).max()) <= bound * (1 + 1e-6)
        assert not values[part]["bias"].any()
    rule = pj.compacter(order=4, size=4).init(KEY, MODEL.params)[1]["shared"]["rule"]
    assert 0.5e-4 < float(rule.std()) < 1.5e-4


@pytest.mark.parametrize(("places", "adapters"), [("both", 114_112), ("feed_forward", 57_088)])
def test_counts_on_t5_base(places, adapters):
    """The paper's 0.073 % and 0.047 % with the 47,616 numbers of the layer norms, of 222.9 million."""
    config = {"num_layers": 12, "num_decoder_layers": 12, "d_model": 768, "d_kv": 64, "d_ff": 3072}
    config |= {"model_type": "t5", "vocab_size": 32128, "num_heads": 12, "decoder_start_token_id": 0}
    model = t5(read_config(config), head="seq2seq_lm")
    norms = r"(.*/)?\w*norm/scale"
    method = pj.chain(pj.compacter(places=places), pj.unfreeze(norms))
    trained = jax.eval_shape(method.init, KEY, model.shapes)[1]
    sizes = {name: sum(leaf.size for leaf in jax.tree.leaves(own)) for name, own in trained.items()}
    assert sizes == {"compacter": adapters, "unfreeze": 47_616}
    share = {"both": 0.073, "feed_forward": 0.047}[places]
    np.testing.assert_allclose(100 * sum(sizes.values()) / 222.9e6, share, atol=5e-4)


def test_one_rule_has_the_gradient_of_all_adapters():
    method = pj.compacter(**OPTIONS)
    frozen, trainable = method.init(KEY, MODEL.params)
    trainable = noisy(trainable)
    forward = pj.adapt(method.model(MODEL.forward))

    def of_layers(rules):
        """The loss where each layer and branch has a rule of its own."""
        params = method.apply(frozen, trainable)
        blocks, added = params["blocks"], params["blocks"]["compacter"]
        own = {branch: {**added[branch], "rule": rules[branch]} for branch in ("attention", "feed_forward")}
        params = {**params, "blocks": {**blocks, "compacter": {**added, **own}}}
        return jnp.sum(jnp.sin(forward(params, MODEL.batch)))

    def of_one(trainable):
        return jnp.sum(jnp.sin(forward(method.apply(frozen, trainable), MODEL.batch)))

    rules = {b: jnp.stack([trainable["shared"]["rule"]] * BLOCKS) for b in ("attention", "feed_forward")}
    parts = jax.jit(jax.grad(of_layers))(rules)
    whole = jax.jit(jax.grad(of_one))(trainable)["shared"]["rule"]
    assert all(float(jnp.abs(part).max()) > 0 for part in jax.tree.leaves(parts))
    assert_close(whole, sum(part.sum(0) for part in parts.values()))


def test_without_a_rule_it_is_the_base():
    method = pj.compacter(**{**OPTIONS, "init_std": 0.0})
    out = method.model(MODEL.forward)(method.apply(*method.init(KEY, MODEL.params)), MODEL.batch)
    np.testing.assert_array_equal(out, MODEL.forward(MODEL.params, MODEL.batch))


@pytest.mark.slow
def test_an_encoder_decoder_has_one_rule_and_none_in_cross_attention():
    model, params = make("none")
    method, batch = pj.compacter(**OPTIONS), token_batch()
    frozen, trainable = method.init(KEY, params)
    branches = {stack: set(own) for stack, own in trainable.items()}
    assert branches.pop("shared") == {"rule"}
    assert branches == {stack: {"attention", "feed_forward"} for stack in ("blocks", "encoder")}

    def loss(trained):
        return jnp.sum(jnp.sin(method.model(model)(method.apply(frozen, trained), batch)))

    gradients = jax.jit(jax.grad(loss))(noisy(trainable))
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(gradients))


def test_what_does_not_fit_is_named():
    with pytest.raises(PeftError, match="compacter: 4 blocks do not divide a bottleneck of 6"):
        pj.compacter(size=6)
    with pytest.raises(PeftError, match=f"3 blocks do not divide a model of width {WIDTH}"):
        pj.compacter(size=6, order=3).init(KEY, MODEL.params)
