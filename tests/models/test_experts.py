"""Experts of a feed-forward, and sinks of attention, against the formulas written out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from support import KEY, assert_close, assert_no_dense_gradient, noisy, normal, quick_at

import peftjax as pj
from peftjax.backbone.attention import Visibility, attend
from peftjax.backbone.block_config import BlockConfig, Experts
from peftjax.backbone.experts import RoutedFeedForward
from peftjax.backbone.rounding import Rounding
from peftjax.backbone.router_logits import with_router_logits
from peftjax.core import tree
from peftjax.core.errors import PeftError
from peftjax.models.families import FAMILIES
from peftjax.planner.flops import count_flops
from peftjax.planner.residuals import kept_arrays
from peftjax.quantize.activations import LogSqrt2

IDS = jax.random.randint(KEY, (2, 11), 1, 61)
BATCH = {"input_ids": IDS, "labels": IDS}


def settings(experts, **changes):
    sizes = {"width": 8, "num_heads": 2, "inner_size": 6, "norm_epsilon": 1e-5, "activation": "silu"}
    return BlockConfig(**{**sizes, "gated": True, "experts": experts, "feed_forward_bias": True, **changes})


def written_out(config, params, x):
    """Every expert on every token, and the coefficients of those that are not chosen zero."""
    experts, layers = config.experts, params["experts"]
    logits = x @ params["router"]["kernel"] + params["router"].get("bias", 0.0)
    chosen = logits >= jnp.sort(logits, axis=-1)[..., -experts.chosen, None]
    if experts.normalized:
        coefficients = jax.nn.softmax(jnp.where(chosen, logits, -jnp.inf), axis=-1)
    else:
        coefficients = jnp.where(chosen, jax.nn.softmax(logits, axis=-1), 0.0)

    def layer(name, x):
        bias = layers[name].get("bias", jnp.zeros(()))
        return jnp.einsum("bsei,eio->bseo", x, layers[name]["kernel"]) + bias

    each = jnp.broadcast_to(x[:, :, None], (*x.shape[:2], experts.count, x.shape[2]))
    gate, up = layer("gate", each) if config.gated else None, layer("up", each)
    if experts.bound is not None:
        gate, up = jnp.minimum(gate, experts.bound), 1 + jnp.clip(up, -experts.bound, experts.bound)
    inner = jax.nn.relu(up) if gate is None else gate * jax.nn.sigmoid(gate) * up
    return jnp.einsum("bseo,bse->bso", layer("down", inner), coefficients)


CASES = {
    "bounded": settings(Experts(count=5, chosen=2, router_bias=True, bound=0.4)),
    "of all": settings(Experts(count=4, chosen=3, normalized=False), feed_forward_bias=False),
    "one": settings(Experts(count=3, chosen=1, normalized=False), gated=False, activation="relu"),
    "every": settings(Experts(count=3, chosen=3), feed_forward_bias=False),
}


def _whole(module, x):
    return module.down(module.activate(*module.expand(x)))


@pytest.mark.parametrize("name", quick_at(CASES, 0))
def test_outputs_and_gradients_are_those_of_the_formula(name):
    config, x = CASES[name], normal(KEY, (2, 7, 8))
    module = RoutedFeedForward(config, jnp.float32)
    params = noisy(module.init(KEY, x, method=_whole)["params"], scale=0.4)
    probe = normal(jax.random.key(1), x.shape)

    def ours(params, x):
        return module.apply({"params": params}, x, method=_whole)

    def both(params, x):
        pairs = [jax.value_and_grad(lambda *a, f=f: jnp.sum(f(*a) * probe), (0, 1))(params, x) for f in fs]
        return (ours(params, x), written_out(config, params, x)), pairs

    fs = (ours, lambda params, x: written_out(config, params, x))
    (found, wanted), (own, formula) = jax.jit(both)(params, x)
    assert_close(found, wanted, 1e-5)
    assert_close(own, formula, 1e-5)


@pytest.fixture(scope="module")
def gpt_oss(decoders, random_decoder):
    return random_decoder(decoders["gpt_oss"])


def step(model, params, method, adapter=None):
    """`(loss, gradient)` of a method, its adapter the one given or one as after some steps."""
    frozen, trainable = method.init(KEY, params)
    forward = pj.adapt(method.model(model))

    def loss(trainable):
        return pj.losses.cross_entropy(forward(method.apply(frozen, trainable), BATCH), BATCH)

    return jax.jit(jax.value_and_grad(loss))(adapter or noisy(trainable, scale=0.02))


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"feed_forward_tile": 4}, marks=pytest.mark.slow),
        pytest.param({"remat": "nothing_saveable"}, marks=pytest.mark.slow),
        pytest.param({"remat": "offload_attention:0.4"}, marks=pytest.mark.slow),
        pytest.param({"unroll": 3}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_tiles_and_policies_change_nothing(gpt_oss, changes):
    model, params = gpt_oss
    method = pj.lora(rank=2, targets=["query", "up", "router"])
    wanted = step(model, params, method)
    assert_close(step(dataclasses.replace(model, **changes), params, method), wanted, 1e-5)


def test_products_are_of_the_chosen_experts_and_backward_keeps_their_inner_rows(gpt_oss):
    model, params = gpt_oss
    experts, block = model.block.config.experts, model.block.config
    pairs = IDS.size * experts.chosen
    loss = lambda params: pj.losses.cross_entropy(model(params, BATCH), BATCH)
    kept = [leaf.shape[1:] for leaf in kept_arrays(loss, params)]
    assert kept.count((pairs, block.inner_size)) == 2  # what enters the activation
    assert (pairs, block.width) not in kept
    one = dataclasses.replace(experts, chosen=1)
    single = dataclasses.replace(
        model, block=model.block.clone(config=dataclasses.replace(block, experts=one))
    )
    forward = lambda model: count_flops(jax.make_jaxpr(lambda p: model(p, BATCH).hidden)(params)).total
    of_one_expert = 3 * 2 * IDS.size * block.width * block.inner_size * model.num_layers
    assert forward(model) - forward(single) == of_one_expert


def test_lora_of_experts_makes_no_dense_weight_and_merges(gpt_oss):
    model, params = gpt_oss
    method = pj.lora(rank=2, targets=".*(attention|experts).*")
    forward = lambda params, batch: jnp.asarray(model(params, batch))
    assert_no_dense_gradient(forward, params, method, BATCH)
    frozen, trainable = method.init(KEY, params)
    assert trainable["blocks/feed_forward/experts/up/kernel"]["a"].shape == (3, 5, 2, 24)
    assert not any("sinks" in path or "router" in path for path in trainable)
    trainable = noisy(trainable)
    run = jax.jit(lambda params: pj.adapt(forward)(params, BATCH))
    assert_close(run(method.apply(frozen, trainable)), run(method.merge(frozen, trainable)), 1e-5)


@pytest.mark.slow
def test_on_codes_a_step_is_that_on_the_numbers_they_stand_for(gpt_oss):
    model, params = gpt_oss
    targets = ".*(query|experts/up).*"
    lora = pj.lora(rank=2, targets=targets)
    coded = pj.chain(pj.nf4(group=16, targets=targets), lora)
    frozen, trainable = coded.init(KEY, params)
    base = tree.map_named(lambda path, leaf: pj.dense(leaf), frozen.params)
    assert isinstance(frozen.params["blocks"]["feed_forward"]["experts"]["up"]["kernel"], pj.Weight)
    adapter = noisy(trainable, scale=0.02)
    loss, grads = step(model, params, coded, adapter)
    wanted, gradients = step(model, base, lora, adapter["lora"])
    assert_close(loss, wanted, 1e-6)
    assert_close(grads["lora"], gradients, 1e-5)


@pytest.mark.slow
def test_in_bfloat16_and_divided_over_devices(gpt_oss):
    """Rows over two devices and experts over none, or both over their axis of a mesh."""
    model, params = gpt_oss
    method = pj.lora(rank=2, targets=["query", "down"])
    frozen, trainable = method.init(KEY, params)
    trainable = noisy(trainable, scale=0.02)

    def gradient(model):
        forward = pj.adapt(model)
        loss = lambda t, f, b: pj.losses.cross_entropy(forward(method.apply(f, t), b), b)
        return jax.jit(jax.value_and_grad(loss))

    wanted = gradient(model)(trainable, frozen, BATCH)
    mesh = jax.make_mesh((2, 2), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    place = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))
    rows = jax.device_put(BATCH, place("data"))
    for spec in (place(), place(None, None, "fsdp")):
        put = lambda path, leaf, spec=spec: jax.device_put(leaf, spec if "experts" in path else place())
        divided = dataclasses.replace(frozen, params=tree.map_named(put, frozen.params))
        assert_close(gradient(model)(trainable, divided, rows), wanted, 1e-5)
    loss, grads = gradient(dataclasses.replace(model, dtype="bfloat16"))(trainable, frozen, BATCH)
    assert abs(float(loss - wanted[0])) < 0.05
    for own, other in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted[1]), strict=True):
        assert own.dtype == other.dtype
        assert np.vdot(own, other) > 0.9 * np.linalg.norm(own) * np.linalg.norm(other)


def test_experts_are_named_or_left_out(gpt_oss):
    _, params = gpt_oss
    for method in (pj.lora(), pj.dora(), pj.paca(), pj.snell()):
        with pytest.raises(
            PeftError, match=r"does not tell what becomes of the experts.*exclude='.\*experts"
        ):
            method.init(KEY, params)
    _, trainable = jax.eval_shape(pj.lora(rank=2, exclude=".*experts.*").init, KEY, params)
    assert {path.split("/")[1] for path in trainable} == {"attention"}
    coded, _ = jax.eval_shape(pj.nf4(group=16).init, KEY, params)
    layers = coded.params["blocks"]["feed_forward"]
    assert isinstance(layers["experts"]["up"]["kernel"], pj.Weight)
    assert not isinstance(layers["router"]["kernel"], pj.Weight)


def test_what_knows_no_experts_says_so(gpt_oss, decoders, random_decoder):
    model, params = gpt_oss
    with pytest.raises(PeftError, match="coded residuals know no experts"):
        pj.coded_residuals().model(model)
    with pytest.raises(PeftError, match="rounded activations know no experts"):
        dataclasses.replace(model.block.config, rounding=Rounding(8, None))
    with pytest.raises(PeftError, match=r"lst: no smaller block of one with 'blocks/.*(experts|sinks)"):
        pj.lst(reduction=2).init(KEY, params)
    with pytest.raises(PeftError, match="have no experts"):
        with_router_logits(random_decoder(decoders["mistral"])[0])
    read = lambda **values: FAMILIES["gpt_oss"].read_config({**decoders["gpt_oss"], **values})
    with pytest.raises(PeftError, match="num_experts_per_tok 6 is more than there are experts, 5"):
        read(num_experts_per_tok=6)
    with pytest.raises(PeftError, match="swiglu_alpha"):
        read(swiglu_alpha=2.0)
    with pytest.raises(PeftError, match="mlp_only_layers"):
        FAMILIES["qwen3_moe"].read_config({**decoders["qwen3_moe"], "mlp_only_layers": [1]})


@pytest.mark.slow
def test_router_logits_come_with_the_same_outputs_and_balance(gpt_oss):
    model, params = gpt_oss
    mask = jnp.asarray(np.arange(11) < [[11], [6]]).astype(jnp.int32)

    def loss(params):
        outputs, logits = with_router_logits(model)(params, BATCH)
        return pj.losses.load_balancing(logits, 2, mask), (outputs.dense(), logits)

    (balance, (outputs, logits)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert_close(outputs, jax.jit(lambda params: model(params, BATCH).dense())(params), 1e-6)
    assert logits.shape == (3, 2, 11, 5)
    assert float(jnp.abs(grads["blocks"]["feed_forward"]["router"]["kernel"]).max()) > 0
    rows = np.asarray(logits)[:, np.asarray(mask) == 1].reshape(-1, 5)
    chosen = np.argsort(rows, -1)[:, -2:]
    shares = np.bincount(chosen.reshape(-1), minlength=5) / len(rows)
    np.testing.assert_allclose(
        balance, 5 * (shares * np.asarray(jax.nn.softmax(rows)).mean(0)).sum(), rtol=1e-5
    )


@pytest.mark.slow
def test_sinks_take_their_share_with_masks_windows_and_a_prefix():
    """Rows of several blocks, grouped heads, and a row that sees nothing but its sink."""
    query, key, value = (normal(jax.random.key(n), (2, 70, heads, 8)) for n, heads in enumerate((4, 2, 2)))
    sinks, probe = normal(jax.random.key(4), (4,)), normal(jax.random.key(5), query.shape)
    mask = np.ones((2, 70), bool)
    mask[0, :9] = False
    near = np.arange(70)[:, None] - np.arange(70)
    allowed = ((near >= 0) & (near < 20))[None] & mask[:, None]
    prefix = {name: normal(jax.random.key(n), (3, 16)) for n, name in enumerate(("keys", "values"), 6)}

    def formula(query, key, value, sinks, prefix):
        one = lambda x: jnp.repeat(x, 2, axis=2)
        added = [jnp.broadcast_to(prefix[n].reshape(1, 3, 2, 8), (2, 3, 2, 8)) for n in ("keys", "values")]
        key, value = one(jnp.concatenate([added[0], key], 1)), one(jnp.concatenate([added[1], value], 1))
        seen = np.concatenate([np.ones((2, 70, 3), bool), allowed], -1)[:, None]
        scores = jnp.where(seen, jnp.einsum("btnh,bsnh->bnts", query, key) * 8**-0.5, -1e30)
        column = jnp.broadcast_to(sinks[:, None, None], (2, 4, 70, 1))
        weights = jax.nn.softmax(jnp.concatenate([scores, column], -1), axis=-1)[..., :-1]
        return jnp.einsum("bnts,bsnh->btnh", weights, value)

    def ours(query, key, value, sinks, prefix):
        visible = Visibility(True, 20)
        return attend(query, key, value, mask=mask, visible=visible, prefix=prefix, sinks=sinks)

    def both(*args):
        total = lambda f: jax.value_and_grad(lambda *a: jnp.sum(f(*a) * probe), range(5))(*args)
        return total(ours), total(formula)

    assert_close(*jax.jit(both)(query, key, value, sinks, prefix), 2e-5)
    codes = LogSqrt2(jnp.float32(1), 4)
    column = jnp.broadcast_to(sinks[:, None, None], (2, 4, 70, 1))
    scores = jnp.einsum("btnh,bsnh->bnts", query, jnp.repeat(key, 2, axis=2)) * 8**-0.5
    weights = codes.rounded(jax.nn.softmax(jnp.concatenate([scores, column], -1), axis=-1)[..., :-1])
    rounded = jnp.einsum("bnts,bsnh->btnh", weights, jnp.repeat(value, 2, axis=2))
    assert_close(attend(query, key, value, sinks=sinks, codes=codes), rounded, 1e-5)
    alone = attend(query[:1, :1], key[:1], value[:1], mask=np.zeros((1, 70), bool), sinks=sinks)
    np.testing.assert_array_equal(alone, 0)


@pytest.mark.parametrize("name", ["gpt_oss", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_generation_token_by_token_is_that_of_whole_passes(decoders, random_decoder, name):
    """Longer than the window, from prompts that are padded on the left."""
    model, params = random_decoder(decoders[name])
    prompts = np.asarray(IDS[:, :9]).copy()
    mask = (np.arange(9) >= [[0], [4]]).astype(np.int32)
    found = pj.generate(
        model, params, {"input_ids": prompts * mask, "attention_mask": mask}, max_new_tokens=8
    )
    forward = jax.jit(lambda params, batch: model(params, batch).dense())
    for row, start in enumerate((0, 4)):
        ids = np.zeros((1, 17), np.int32)
        ids[0, : 9 - start] = prompts[row, start:]
        for number, token in enumerate(np.asarray(found.tokens)[row]):
            at = 8 - start + number
            logits = np.asarray(forward(params, {"input_ids": ids}))[0, at]
            assert logits.max() - logits[token] < 1e-4
            ids[0, at + 1 : at + 2] = token
