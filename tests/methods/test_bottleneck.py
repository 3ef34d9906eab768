"""The bottleneck adapters: their formula, their places and what they leave alone."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import KEY, assert_close, normal, quick_at
from tiny_models import BLOCKS, WIDTH, moved, tiny
from tiny_t5 import make, token_batch

import peftjax as pj
from peftjax.core import tree
from peftjax.core.errors import PeftError
from peftjax.methods.bottleneck._bottleneck import AdapterBlock, Adapters, Bottleneck
from peftjax.models.vit import ViTConfig, vit
from peftjax.weights.low_rank import LowRank

MODEL = tiny("backbone")
STREAM = normal(KEY, (2, 5, WIDTH))
ACTIVATIONS = {"relu": lambda x: np.maximum(x, 0), "tanh": np.tanh, "identity": lambda x: x}


def layer_of(bottleneck):
    """The parameters of one layer, none of them trivial."""
    return jax.tree.map(lambda leaf: leaf[0], moved(bottleneck.init(KEY, 1, WIDTH)))


def normed(part, x):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * part["scale"] + part["bias"]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", ["none", "in", "out"])
def test_the_formula(activation, norm):
    bottleneck = Bottleneck(3, scale=0.7, activation=activation, norm=norm, learn_scale=norm == "in")
    layer = layer_of(bottleneck)
    u = np.asarray(STREAM)
    inner = (normed(layer["norm"], u) if norm == "in" else u) @ layer["down"]["kernel"] + layer["down"][
        "bias"
    ]
    wanted = ACTIVATIONS[activation](inner) @ layer["up"]["kernel"] + layer["up"]["bias"]
    wanted = wanted * (layer["scale"] if norm == "in" else 0.7)
    wanted = normed(layer["norm"], wanted) if norm == "out" else wanted
    assert_close(bottleneck.run(layer, STREAM), wanted)


def test_without_an_activation_it_is_lora():
    bottleneck = Bottleneck(3, scale=0.5, activation="identity")
    layer = layer_of(bottleneck)
    zero = {part: {**layer[part], "bias": 0 * layer[part]["bias"]} for part in ("down", "up")}
    kernels = layer["down"]["kernel"].T, layer["up"]["kernel"]
    method = pj.lora(rank=3, alpha=1.5, targets=["w"])
    frozen, _ = method.init(KEY, {"w": {"kernel": jnp.zeros((WIDTH, WIDTH))}})
    weight = method.apply(frozen, {"w/kernel": {"a": kernels[0], "b": kernels[1]}})["w"]["kernel"]
    assert isinstance(weight, LowRank)
    assert_close(bottleneck.run(zero, STREAM), pj.matmul(STREAM, weight))


@pytest.mark.slow
def test_dropout_zeroes_and_rescales_what_enters_the_way_up():
    bottleneck = Bottleneck(64, activation="identity", dropout=0.5)
    layer = layer_of(bottleneck)
    layer["up"]["kernel"] = jnp.ones_like(layer["up"]["kernel"])
    keys = jax.random.split(KEY, 400)
    dropped = jax.vmap(lambda key: bottleneck.run(layer, STREAM, key))(keys)
    whole = bottleneck.run(layer, STREAM)
    assert float(dropped.std(0).min()) > 0.1
    assert float(jnp.abs(dropped.mean(0) - whole).max()) < 5 * float(dropped.std(0).max()) / 20


def block_with(form, params):
    """A block whose feed-forward gives back what it is told to, adapted."""
    inner = types.SimpleNamespace(
        feed_forward_branch=lambda hidden: hidden[1], get_variable=lambda collection, name: params[name]
    )
    adapters = Adapters(feed_forward=Bottleneck(3, form))
    block = AdapterBlock(inner, "own", adapters)
    return lambda x, h: block._adapted("feed_forward", x, block.inner.feed_forward_branch((x, h)))


def test_a_sequential_one_is_in_the_way_of_the_gradient_and_a_parallel_one_beside_it():
    params = {"own": {"feed_forward": layer_of(Bottleneck(3))}}
    x, h = STREAM[0, 0], STREAM[1, 0]
    own = jax.jacobian(lambda u: Bottleneck(3).run(params["own"]["feed_forward"], u))
    for form, of_x, of_h in (
        ("sequential", jnp.zeros((WIDTH, WIDTH)), jnp.eye(WIDTH) + own(h)),
        ("parallel", own(x), jnp.eye(WIDTH)),
    ):
        assert_close(jax.jacobian(block_with(form, params), (0, 1))(x, h), (of_x, of_h))


def update_of(method, params=MODEL.params, trained=None):
    """What the method changes in the stream after the last block."""
    frozen, fresh = method.init(KEY, params)
    trained = moved(fresh) if trained is None else trained
    hidden, context = MODEL.forward.run_embed(params, MODEL.batch)
    base = MODEL.forward.run_blocks(params, hidden, context)
    adapted = method.model(MODEL.forward).run_blocks(method.apply(frozen, trained), hidden, context)
    return adapted - base


@pytest.mark.slow
def test_the_update_is_linear_in_the_scale():
    last = {"layers": [BLOCKS - 1], "size": 3}
    one, three = (update_of(pj.parallel_adapter(scale=scale, **last)) for scale in (1.0, 3.0))
    assert float(jnp.abs(one).max()) > 0.01
    assert_close(three, 3.0 * one)


def test_a_scale_of_zero_is_the_base():
    np.testing.assert_array_equal(update_of(pj.adaptformer(size=3, scale=0.0)), 0.0)


@pytest.mark.parametrize("norm", quick_at(["in", "out"], 0))
def test_with_a_norm_it_begins_as_the_base(norm):
    method = pj.adaptformer(size=3, norm=norm)
    fresh = method.init(KEY, MODEL.params)[1]
    np.testing.assert_array_equal(update_of(method, trained=fresh), 0.0)
    assert float(jnp.abs(update_of(method)).max()) > 1e-3


@pytest.mark.parametrize(("init", "std"), quick_at([("bert", 0.02), ("houlsby", 0.0088)], 0))
def test_starts_near_the_base(init, std):
    values = Bottleneck(50, init_as=init).init(KEY, 4, 300)
    for part in ("down", "up"):
        np.testing.assert_allclose(values[part]["kernel"].std(), std, rtol=0.02)
    assert (float(jnp.abs(values["up"]["kernel"]).max()) <= 0.02) == (init == "houlsby")


@pytest.mark.slow
@pytest.mark.parametrize("method", [pj.houlsby, pj.parallel_adapter], ids=lambda make: make.__name__)
def test_layers_that_are_left_out_have_no_numbers_and_stay_as_they_were(method):
    options = {"places": "both", "norm": "in"} if method is pj.parallel_adapter else {}
    whole, part = method(size=3, **options), method(size=3, layers=1, **options)
    fresh = part.init(KEY, MODEL.params)[1]
    assert {leaf.shape[0] for leaf in jax.tree.leaves(fresh)} == {1}
    trained = moved(fresh)
    _, of_all = whole.init(KEY, MODEL.params)
    zeros = jax.tree.map(lambda own, all_: jnp.zeros_like(all_).at[1].set(own[0]), trained, of_all)
    assert_close(update_of(part, trained=trained), update_of(whole, trained=zeros))


def test_a_layer_that_is_not_there():
    for layers, text in (
        ([0, BLOCKS], rf"layer {BLOCKS}; give numbers from 0 to {BLOCKS - 1}"),
        ([], "no layer"),
    ):
        with pytest.raises(PeftError, match=f"pfeiffer: layers names {text}"):
            pj.pfeiffer(layers=layers).init(KEY, MODEL.params)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"size": 0}, "the width of the bottleneck must be positive, got 0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"activation": "swich"}, "activation must be one of identity, relu, .*, got 'swich'"),
        ({"init": "zero"}, "init must be one of lora, bert, houlsby, got 'zero'"),
        ({"norm": "both"}, "norm must be one of none, in, out, got 'both'"),
        ({"places": "mlp"}, "places must be one of feed_forward, attention, both, got 'mlp'"),
    ],
)
def test_a_setting_out_of_range(options, text):
    with pytest.raises(PeftError, match=f"parallel_adapter: .*{text}"):
        pj.parallel_adapter(**options)


def test_adaptformers_count_on_a_base_sized_vit():
    """12 layers of 2 · 768 · 64 + 64 + 768."""
    model = vit(ViTConfig())
    shapes = jax.eval_shape(model.init, KEY)
    trainable = jax.eval_shape(pj.adaptformer().init, KEY, shapes)[1]
    assert sum(leaf.size for leaf in jax.tree.leaves(trainable)) == 1_189_632


@pytest.mark.slow
def test_houlsby_trains_the_norms_beside_it():
    method = pj.chain(pj.houlsby(size=3), pj.unfreeze(["attention_norm", "feed_forward_norm"]))
    frozen, trainable = method.init(KEY, MODEL.params)
    assert set(trainable["unfreeze"]) == {"blocks/attention_norm/scale", "blocks/feed_forward_norm/scale"}
    out = pj.adapt(method.model(MODEL.forward))(method.apply(frozen, moved(trainable)), MODEL.batch)
    alone = pj.houlsby(size=3)
    params = tree.replace(MODEL.params, moved(trainable)["unfreeze"])
    own = alone.apply(alone.init(KEY, params)[0], moved(trainable)["houlsby"])
    assert_close(out, alone.model(MODEL.forward)(own, MODEL.batch))


@pytest.mark.slow
def test_in_an_encoder_decoder_cross_attention_has_its_own():
    model, params = make("none")
    method, batch = pj.houlsby(size=3), token_batch()
    frozen, trainable = method.init(KEY, params)
    assert set(trainable["blocks"]) == {"attention", "cross_attention", "feed_forward"}
    assert set(trainable["encoder"]) == {"attention", "feed_forward"}
    trained = moved(trainable)

    def loss(trained):
        return jnp.sum(jnp.sin(method.model(model)(method.apply(frozen, trained), batch)))

    for path, grad in tree.named_leaves(jax.jit(jax.grad(loss))(trained)).items():
        assert all(np.abs(one).max() > 0 for one in np.asarray(grad)), path


@pytest.mark.slow
@pytest.mark.parametrize(("layers", "of_encoder"), [([1, 2], 1), (2, 0)])
def test_layers_that_only_the_longer_stack_has(layers, of_encoder):
    """The decoder has three, the encoder two."""
    model, params = make("none")
    method, batch = pj.mam(length=2, mlp_size=4, size=3, layers=layers), token_batch()
    frozen, trainable = method.init(KEY, params)
    lengths = {stack: len(own["feed_forward"]["up"]["bias"]) for stack, own in trainable.items()}
    assert lengths == {"blocks": np.size(layers), **({"encoder": of_encoder} if of_encoder else {})}
    adapted = method.apply(frozen, trainable)
    assert ("mam" in adapted["encoder"]["blocks"]) == bool(of_encoder)
    out = jax.eval_shape(method.model(model), adapted, batch)
    assert out.shape == jax.eval_shape(model, params, batch).shape
