"""MEFT: exact gradients where the inverse is exact, memory that does not grow with depth, composition."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support import KEY, assert_close, made_shapes, noisy
from tiny_decoder import PROMPTS, make_decoder, padded, without_cache
from tiny_models import tiny
from tiny_t5 import make as make_t5
from tiny_t5 import token_batch

import peftjax as pj
from peftjax.core import tree
from peftjax.core.errors import PeftError
from peftjax.losses import classification
from peftjax.methods.reversible.check import largest_error, with_stack
from peftjax.models.bert import BertConfig, bert
from peftjax.planner.residuals import kept_arrays
from peftjax.train.step import model_loss

WIDTH, TOKENS = 32, 12
BATCH = {"input_ids": jax.random.randint(KEY, (2, TOKENS), 0, 50)}
LORA = r".*blocks/(attention|feed_forward)/.*kernel"


@functools.cache
def encoder(layers=12, **rates):
    """A post-norm encoder and its parameters, weights as those of trained models are sized."""
    config = BertConfig(
        vocab_size=50,
        hidden_size=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=4 * WIDTH,
        max_position_embeddings=16,
        **rates,
    )
    model = bert(config, head="none")
    return model, jax.jit(model.init)(KEY)


def gradients(forward, method, frozen, trainable, batch=BATCH, key=None):
    """Of every trained leaf by its name, compiled."""

    def loss(trainable, frozen):
        params = method.apply(frozen, trainable, key=key)
        out = pj.adapt(forward)(params, batch, key=key)
        weight = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        return jnp.sum(weight * jnp.sin(out.astype(jnp.float32)))

    return tree.named_leaves(jax.jit(jax.grad(loss))(trainable, frozen))


def error(method, model_and_params, *others, batch=BATCH, key=None, trained=False):
    """The largest relative error of a gradient beside ordinary backpropagation, for each `anchor_every`."""
    model, params = model_and_params
    frozen, trainable = method.init(KEY, params)
    trainable = noisy(trainable) if trained else trainable
    forward = method.model(model)
    exact = gradients(with_stack(forward, num_reversible=0), method, frozen, trainable, batch, key)
    assert all(float(jnp.abs(g).max()) > 0 for g in exact.values())
    found = [
        gradients(changed, method, frozen, trainable, batch, key)
        for changed in (forward, *(with_stack(forward, every=every) for every in others))
    ]
    errors = [largest_error(one, exact, {model.num_layers})[0] for one in found]
    return errors if others else errors[0]


SLOW = pytest.mark.slow
VARIANTS = [1, pytest.param(2, marks=SLOW), pytest.param(3, marks=SLOW)]


# Exactness.


@pytest.mark.slow
@pytest.mark.parametrize("variant", [1, 3])
def test_gradients_without_division_are_exact_through_twelve_layers(variant):
    assert error(pj.meft(variant=variant, lam=1.0, beta=1.0, anchor_every=0), encoder()) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_with_the_released_settings_are_exact_between_anchors_only(variant):
    """Without anchors, the last one, twelve layers are too many: that is what the defaults are for."""
    default, of_two, without = error(pj.meft(variant=variant), encoder(), 2, 0)
    assert default < 1e-3
    assert of_two < 1e-4
    assert without > 1e-1


def two_streams(method, model, params, trainable, frozen):
    """The output by the equations alone, layer by layer."""
    lam, beta, forward = method.config["lam"], method.config["beta"], method.model(model)
    params = method.apply(frozen, trainable)
    hidden, context = forward.run_embed(params, BATCH)
    layer = functools.partial(forward.run_layer, context=context)
    bottleneck = forward.stack.adapter

    def step(pair, own):
        x1, x2 = pair
        if method.config["variant"] == 3:
            y1 = lam * x1 + layer(own, x2, part="attention")
            return (y1, beta * x2 + layer(own, y1, part="feed_forward")), None
        alone = lambda x: bottleneck.run(own.weights["meft"]["adapter"], x)
        whole = lambda x: layer(own, x)
        f, g = (whole, alone) if method.config["variant"] == 1 else (alone, whole)
        y1 = lam * x1 + f(x2)
        return (beta * x2 + g(y1), y1), None

    x1, x2 = jax.lax.scan(step, (hidden, hidden), forward.layers(params))[0]
    return 0.5 * (x1 + x2)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_without_a_reversible_layer_it_is_the_ordinary_network_bit_by_bit(variant):
    model, params = encoder(3)
    method = pj.meft(variant=variant, num_reversible=0)
    frozen, trainable = method.init(KEY, params)

    def program(run):
        return jax.jit(jax.value_and_grad(lambda t, f: jnp.sum(jnp.sin(run(t, f)))))(trainable, frozen)

    forward = method.model(model)
    got = program(lambda t, f: forward(method.apply(f, t), BATCH))
    wanted = program(lambda t, f: two_streams(method, model, params, t, f))
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


@pytest.mark.slow
def test_some_layers_may_be_ordinary():
    assert error(pj.meft(lam=1.0, anchor_every=0, num_reversible=2), encoder(3)) < 1e-5


@pytest.mark.slow
def test_the_start_is_near_the_pre_trained_model():
    model, params = encoder()
    method = pj.meft(lam=1e-6)
    frozen, trainable = method.init(KEY, params)
    trainable = jax.tree.map(jnp.zeros_like, trainable)
    hidden, context = model.run_embed(params, BATCH)
    layers = model.layers(params)
    last, states = jax.lax.scan(lambda h, own: (model.run_layer(own, h, context), h), hidden, layers)
    assert_close(method.model(model)(method.apply(frozen, trainable), BATCH), 0.5 * (last + states[-1]), 1e-4)
    method = pj.meft()
    out = method.model(model)(method.apply(*method.init(KEY, params)), BATCH)
    assert float(jnp.vdot(out, last) / (jnp.linalg.norm(out) * jnp.linalg.norm(last))) > 0.99


# Randomness.


@pytest.mark.slow
def test_dropout_is_the_same_when_a_layer_is_made_again():
    model = encoder(3, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
    method = pj.meft(lam=1.0, anchor_every=0, dropout=0.3)
    assert error(method, model, key=KEY) < 1e-5


@pytest.mark.slow
def test_every_layer_and_adapter_has_its_own_mask():
    method = pj.meft(size=64, dropout=0.5)
    _, params = encoder(3)
    keys = method.apply(*method.init(KEY, params), key=KEY)["blocks"]["meft"]["key"]
    assert len(np.unique(jax.random.key_data(keys), axis=0)) == 3


# Memory.


def kept(layers, every, **changes):
    """Dtypes and shapes of what backward keeps and is no argument of the step."""
    model, params = encoder(layers)
    method = pj.meft(anchor_every=every)
    frozen, trainable = method.init(KEY, params)
    forward = method.model(dataclasses.replace(model, **changes))
    run = lambda trainable, frozen, batch: forward(method.apply(frozen, trainable), batch)
    arrays = kept_arrays(run, trainable, frozen, BATCH)
    return sorted((str(array.dtype), array.shape) for array in arrays if array.ndim)


@pytest.mark.slow
def test_backward_keeps_one_pair_whatever_the_depth():
    own = [("float32", (1, 2, TOKENS, WIDTH))] * 2
    numbers = lambda layers: [("bool", (2, TOKENS)), ("int32", (layers,))]
    for layers in (2, 8):
        assert kept(layers, 0) == sorted([*own, *numbers(layers)])


@pytest.mark.slow
def test_anchors_keep_one_pair_for_each_segment_in_float32():
    found = kept(8, 3, dtype="bfloat16")
    assert [a for a in found if a[1][-1] == WIDTH] == [("float32", (3, 2, TOKENS, WIDTH))] * 2


def temporaries(layers, method):
    model, params = encoder(layers)
    frozen, trainable = method.init(KEY, params)
    forward = method.model(model)

    def loss(trainable, frozen, batch):
        return jnp.sum(forward(method.apply(frozen, trainable), batch) ** 2)

    batch = {"input_ids": jax.ShapeDtypeStruct((16, 16), jnp.int32)}
    compiled = jax.jit(jax.grad(loss)).lower(trainable, frozen, batch).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_compiled_temporaries_do_not_grow_with_depth():
    stream = 4 * 16 * 16 * WIDTH
    shallow, deep = (temporaries(layers, pj.meft(anchor_every=0)) for layers in (2, 10))
    assert deep - shallow < stream  # not one more for eight layers
    anchored = temporaries(10, pj.meft(anchor_every=2))
    assert 8 * stream <= anchored - deep < 11 * stream  # four pairs more, and the one that is written
    assert temporaries(10, pj.pfeiffer(size=8)) > anchored + 8 * 2 * stream


def test_no_gradient_of_a_frozen_weight_is_made():
    model, params = encoder(2)
    method = pj.meft(size=3)
    frozen, trainable = method.init(KEY, params)
    step = jax.grad(lambda t, f: jnp.sum(method.model(model)(method.apply(f, t), BATCH) ** 2))
    shapes = {leaf.shape[1:] for leaf in jax.tree.leaves(params["blocks"]) if leaf.ndim == 3}
    assert shapes == {(WIDTH, WIDTH), (WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH)}
    made = set(made_shapes(jax.make_jaxpr(step)(trainable, frozen).jaxpr))
    assert not made & (shapes | {(2, *shape) for shape in shapes})
    assert (WIDTH, 3) in made


# With the rest of the library.


OVER_LORA = pj.chain(pj.lora(rank=2, targets=LORA), pj.meft(lam=1.0, anchor_every=2))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "dora", "snell", "paca", "vera"])
def test_a_rewritten_base_gets_its_own_gradients(name):
    """Also one whose weights have parts that are integers or keys."""
    own = getattr(pj, name)(rank=2, targets=LORA)
    assert error(pj.chain(own, pj.meft(lam=1.0, anchor_every=2)), encoder(3), trained=True) < 1e-5


@pytest.mark.slow
def test_a_base_with_lora_gets_no_dense_gradient():
    method, (model, params) = OVER_LORA, encoder(2)
    frozen, trainable = method.init(KEY, params)
    forward = method.model(model)

    def loss(trainable, frozen):
        return jnp.sum(pj.adapt(forward)(method.apply(frozen, trainable), BATCH))

    made = set(made_shapes(jax.make_jaxpr(jax.grad(loss))(trainable, frozen).jaxpr))
    shapes = {(WIDTH, WIDTH), (WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH)}
    assert not made & (shapes | {(2, *shape) for shape in shapes})
    assert (2, WIDTH) in made


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_generation_with_a_cache_is_generation_without(variant):
    model, params = make_decoder()
    method = pj.meft(variant=variant, lam=0.5, beta=0.5)
    frozen, trainable = method.init(KEY, params)
    adapted, params = method.model(model), method.apply(frozen, noisy(trainable))
    wanted, lead = without_cache(adapted, params, PROMPTS, 4)
    assert lead > 1e-4
    made = pj.generate(adapted, params, padded(PROMPTS), max_new_tokens=4)
    np.testing.assert_array_equal(made.tokens, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("variant", [1, 3])
def test_both_stacks_of_an_encoder_decoder(variant):
    """The gradient of the encoder's adapters comes through the context of every layer of the decoder.

    The norms round to float32: up to 1.2e-4 was seen.
    """
    method = pj.meft(variant=variant, size=2, lam=1.0, beta=1.0, anchor_every=0)
    method = pj.chain(method, pj.unfreeze(["embed/decoder_positions"]))
    assert error(method, make_t5("none"), batch=token_batch(), trained=True) < 2e-4


@pytest.mark.slow
def test_sharded_over_batch_and_columns():
    model, params = encoder(3)
    method = pj.meft(lam=1.0, anchor_every=2)
    frozen, trainable = method.init(KEY, params)
    batch = {"input_ids": jnp.tile(BATCH["input_ids"], (2, 1))}
    want = gradients(method.model(model), method, frozen, trainable, batch)
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)

    def spread(leaf):
        return jax.device_put(leaf, NamedSharding(mesh, P(None, None, "tensor") if leaf.ndim == 3 else P()))

    frozen = dataclasses.replace(frozen, params=jax.tree.map(spread, frozen.params))
    batch = jax.device_put(batch, NamedSharding(mesh, P("data")))
    trainable = jax.device_put(trainable, NamedSharding(mesh, P()))
    assert_close(gradients(method.model(model), method, frozen, trainable, batch), want, 1e-4)


@pytest.mark.slow
def test_it_trains_in_the_one_loop_with_all_dropout_and_parts_of_batches():
    model, params = encoder(2, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    method, tx = pj.meft(dropout=0.1), optax.adam(1e-2)
    forward = method.model(dataclasses.replace(model, dtype="bfloat16"))
    training = pj.training(
        method, model_loss(forward, classification, model_dropout=True), tx, accumulation=2
    )
    ids = BATCH["input_ids"]
    batch = {"input_ids": ids, "labels": ids % 5, "weights": jnp.ones(ids.shape)}
    state, losses = training.start(KEY, params), []
    for _ in range(20):
        state, metrics = training.step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.8 * losses[0]


def test_the_defaults_keep_more_where_the_backbone_rounds_more():
    model, _ = encoder(2)
    every = lambda **options: [
        pj.meft(variant=variant, **options).model(model).stack.every for variant in (1, 2, 3)
    ]
    assert every() == [4, 3, 2]
    assert every(anchor_every=5) == [5] * 3
    model = dataclasses.replace(model, dtype="bfloat16")
    assert every() == [2, 1, 1]


def test_the_activation_is_the_models():
    assert pj.meft().model(encoder(2)[0]).stack.adapter.activation == "gelu"
    assert pj.meft().model(tiny("backbone").forward).stack.adapter.activation == "silu"
    assert pj.meft(activation="relu").model(encoder(2)[0]).block.adapters.feed_forward.activation == "relu"


# Errors.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": 4}, "variant must be one of 1, 2, 3, got 4"),
        ({"lam": 0.0}, "lam must be positive"),
        ({"beta": -1.0}, "beta must be positive"),
        ({"anchor_every": -1}, "anchor_every must be 0 or more"),
        ({"num_reversible": -1}, "num_reversible must be 0 or more"),
        ({"size": 0}, "the width of the bottleneck must be positive, got 0"),
    ],
)
def test_a_setting_out_of_range(options, message):
    with pytest.raises(PeftError, match=message):
        pj.meft(**options)


def test_more_reversible_layers_than_there_are():
    model, params = encoder(2)
    method = pj.meft(num_reversible=3)
    with pytest.raises(PeftError, match="num_reversible is 3, but a stack has 2 layers"):
        jax.eval_shape(method.model(model), method.apply(*method.init(KEY, params)), BATCH)


def test_two_methods_that_run_the_blocks():
    stack = pj.meft().model(encoder(2)[0])
    with pytest.raises(PeftError, match="'meft' and 'meft' both run the blocks"):
        pj.meft().model(stack)
