import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from support import quick_at

from peftjax.backbone.backbone import REMAT_POLICIES
from peftjax.backbone.context import Context
from peftjax.backbone.layers import Dropout
from peftjax.core.errors import PeftError
from peftjax.models.bert import bert


def loss(model, batch, key=None):
    return lambda params: jnp.sum(jnp.sin(model(params, batch, key=key).astype(jnp.float32)))


def residuals(function, params):
    """Shapes and dtypes of what the backward pass of `function` reads."""
    return jax.tree.leaves(jax.eval_shape(lambda params: jax.vjp(function, params)[1], params))


def close(a, b, rtol=1e-4):
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(b))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=rtol * scale), a, b)


def test_parameter_paths_are_the_contract(classifier):
    params = classifier[1]
    paths = set(flatten_dict(params, sep="/"))
    pair = lambda stem: {f"{stem}/kernel", f"{stem}/bias"}
    norm = lambda stem: {f"{stem}/scale", f"{stem}/bias"}
    expected = {f"embed/{name}/embedding" for name in ("word", "position", "token_type")}
    expected |= norm("embed/norm") | pair("head/pooler") | pair("head/classifier")
    expected |= norm("blocks/attention_norm") | norm("blocks/feed_forward_norm")
    for name in ("query", "key", "value", "output"):
        expected |= pair(f"blocks/attention/{name}")
    expected |= pair("blocks/feed_forward/up") | pair("blocks/feed_forward/down")
    assert paths == expected
    assert params["blocks"]["feed_forward"]["up"]["kernel"].shape == (3, 16, 40)


@pytest.mark.slow
def test_layers_are_initialized_independently(config):
    kernel = bert(config).init(jax.random.key(0))["blocks"]["attention"]["query"]["kernel"]
    assert not jnp.allclose(kernel[0], kernel[1])
    np.testing.assert_allclose(kernel.std(), config.initializer_range, rtol=0.1)


@pytest.mark.slow
def test_scan_equals_a_loop_over_the_block_parts(classifier, batch):
    model, params = classifier
    hidden, context = model.run_embed(params, batch)
    for layer in range(model.num_layers):
        weights = {"params": jax.tree.map(lambda x: x[layer], params["blocks"])}  # noqa: B023
        call = lambda method, *args: model.block.apply(weights, *args, method=method)  # noqa: B023
        for branch, args in (("attention", (context,)), ("feed_forward", ())):
            update = call(f"{branch}_branch", hidden, *args)
            joined = call(f"{branch}_join", hidden, update)
            np.testing.assert_array_equal(joined, call(f"normalize_{branch}", hidden + update))
            hidden = joined
    close(model(params, batch), model.run_head(params, hidden, context))


@pytest.fixture(scope="module")
def gradient(classifier, batch):
    model, params = classifier
    return jax.jit(jax.grad(loss(model, batch, jax.random.key(3))))(params)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["nothing_saveable", "offload_dot_with_no_batch_dims"])
def test_remat_gives_the_same_gradients(classifier, batch, gradient, policy):
    model, params = classifier
    again = loss(dataclasses.replace(model, remat=policy), batch, jax.random.key(3))
    close(jax.jit(jax.grad(again))(params), gradient)


@pytest.mark.parametrize("policy", quick_at(["none", *REMAT_POLICIES], every=3))
def test_every_remat_policy_traces(classifier, batch, policy):
    model, params = classifier
    function = loss(dataclasses.replace(model, remat=policy), batch)
    assert residuals(function, params)


def test_remat_policy_decides_what_a_block_keeps(classifier, batch):
    model, params = classifier
    kept = {}
    for policy in ("none", "nothing_saveable"):
        function = loss(dataclasses.replace(model, remat=policy), batch)
        kept[policy] = [x.shape for x in residuals(function, params) if x.shape[:2] == (3, 2)]
    assert kept["nothing_saveable"] == [(3, 2, 9, 16)]
    assert len(kept["none"]) > 5


def test_unknown_policy_names_the_nearest(classifier):
    with pytest.raises(PeftError, match=r"'dots_savable'.*dots_saveable"):
        dataclasses.replace(classifier[0], remat="dots_savable")


def test_unknown_dtype_is_an_error(classifier):
    with pytest.raises(PeftError, match=r"'bf16'.*bfloat16"):
        dataclasses.replace(classifier[0], dtype="bf16")


@pytest.mark.slow
def test_compute_dtype_keeps_parameters_and_activations_once(classifier, batch):
    """In bfloat16 a layer keeps 12 D values per token, no float32, no mask and no cast kernel."""
    model, params = classifier
    half = dataclasses.replace(model, dtype="bfloat16")
    logits = half(params, batch)
    assert logits.dtype == jnp.bfloat16
    np.testing.assert_allclose(logits.astype(jnp.float32), model(params, batch), atol=0.15)
    kept = residuals(loss(half, batch, jax.random.key(0)), params)
    kept = [x for x in kept if x.ndim > 1 and x.shape[0] == 3]
    activations = [x for x in kept if x.shape[1] == 2]
    assert {x.dtype for x in activations} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in kept if x.shape[1] != 2} == {jnp.dtype(jnp.float32)}
    # 8 tensors of width D = 16 and one of the inner size 40, for 3 layers of 2 x 9 tokens.
    assert sum(x.size for x in activations) == 3 * 18 * (8 * 16 + 40)


@pytest.mark.slow
def test_dropout_needs_a_key_and_differs_per_layer_and_site(config, classifier, batch):
    params = classifier[1]
    rates = {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.0}
    model = bert(dataclasses.replace(config, **rates), head="classifier")
    run = jax.jit(lambda key: model(params, batch, key=key))
    np.testing.assert_array_equal(model(params, batch), classifier[0](params, batch))
    np.testing.assert_array_equal(run(jax.random.key(1)), run(jax.random.key(1)))
    assert not jnp.allclose(run(jax.random.key(1)), run(jax.random.key(2)))
    layer = {"params": jax.tree.map(lambda x: x[0], params["blocks"])}
    hidden, context = model.run_embed(params, batch)
    rngs = {"dropout": jax.random.key(1)}
    dropped = {
        name: model.block.apply(layer, hidden, *args, method=name, rngs=rngs) == 0
        for name, args in (("attention_branch", (context,)), ("feed_forward_branch", ()))
    }
    assert all(0.35 < mask.mean() < 0.65 for mask in dropped.values())
    assert (dropped["attention_branch"] != dropped["feed_forward_branch"]).any()


class DropOnly(nn.Module):
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, hidden, context):
        return hidden + Dropout(0.5)(jnp.ones_like(hidden))


def test_layers_draw_different_dropout(classifier):
    """Each of the three layers adds 0 or 2: equal masks would add up to 0 or 6 alone."""
    model = dataclasses.replace(classifier[0], block=DropOnly())
    hidden = model.run_blocks({"blocks": {}}, jnp.zeros((1, 8, 8)), Context(), key=jax.random.key(0))
    assert set(np.unique(hidden)) == {0, 2, 4, 6}


@pytest.mark.slow
def test_attention_dropout_is_unbiased(config, classifier, batch):
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.3}
    model, params = bert(dataclasses.replace(config, **rates)), classifier[1]
    layer = {"params": jax.tree.map(lambda x: x[0], params["blocks"])}
    hidden, context = model.run_embed(params, batch)
    run = lambda rngs: model.block.apply(layer, hidden, context, method="attention_branch", rngs=rngs)
    samples = jax.vmap(lambda key: run({"dropout": key}))(jax.random.split(jax.random.key(1), 2000))
    spread = samples.std(axis=0)[batch["attention_mask"] == 1]
    assert spread.min() > 0
    error = jnp.abs(samples.mean(axis=0) - run({}))[batch["attention_mask"] == 1]
    assert (error / spread).max() < 5 / np.sqrt(2000)


def test_padding_does_not_reach_tokens(classifier, batch):
    model, params = classifier
    other = dict(batch, input_ids=np.where(batch["attention_mask"], batch["input_ids"], 7))
    np.testing.assert_array_equal(model(params, batch), model(params, other))


def test_absent_mask_and_types_mean_all_tokens_of_type_zero(classifier, batch):
    model, params = classifier
    ids = batch["input_ids"]
    full = {"input_ids": ids, "attention_mask": ids * 0 + 1, "token_type_ids": ids * 0}
    np.testing.assert_array_equal(model(params, {"input_ids": ids}), model(params, full))


@pytest.mark.slow
def test_mean_heads_average_over_tokens(config, batch):
    model = bert(config, head="mean_classifier")
    params = model.init(jax.random.key(0))
    hidden, mask = bert(config)(params, batch), batch["attention_mask"][..., None]
    mean = (hidden * mask).sum(1) / mask.sum(1)
    close(bert(config, head="mean")(params, batch), mean)
    classifier = params["head"]["classifier"]
    close(model(params, batch), mean @ classifier["kernel"] + classifier["bias"])


def test_too_long_input_is_an_error(classifier):
    with pytest.raises(PeftError, match=r"13 positions.*has 12"):
        classifier[0](classifier[1], {"input_ids": jnp.ones((1, 13), jnp.int32)})


def test_unknown_head_names_the_nearest(config):
    with pytest.raises(PeftError, match=r"'clasifier'.*classifier"):
        bert(config, head="clasifier")
