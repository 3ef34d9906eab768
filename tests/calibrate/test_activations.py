"""Ranges of activations from a few batches, and scales that are moved into norms and weights."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_t5
from support import KEY, quick_at

import peftjax as pj
from peftjax.backbone.attention import attend
from peftjax.calibrate.reparameterization import READERS, rescaled
from peftjax.core.errors import PeftError
from peftjax.methods.quantization.rounded_activations import learned_ranges
from peftjax.models.bert import BertConfig, bert
from peftjax.models.families import FAMILIES
from peftjax.models.vit import ViTConfig, vit
from peftjax.planner.residuals import kept_arrays, nbytes
from peftjax.quantize.activations import LogSqrt2, Uniform

SIZES = {
    "vocab_size": 19,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
}
LAYERS, WIDTH = 2, 16
RNG = np.random.default_rng(0)
MODELS = {
    "gpt2": {
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 16,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16, "pad_token_id": 0},
    "llama": {},
    "gemma2": {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8},
}


def drawn(model, seed=0):
    """Parameters none of which are zero or one, with norms whose channels are of very different sizes."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        x = rng.standard_normal(leaf.shape)
        if "blocks" in name and "norm" in name and "post" not in name:
            # Of each channel the same in scale and bias, so that its range is far from zero.
            sizes = np.exp(np.random.default_rng(seed + 1).standard_normal(leaf.shape))
            x = sizes if "scale" in name else 2 * x * sizes
        else:
            x = x * leaf.shape[-2] ** -0.5 if leaf.ndim > 2 else 0.3 * x
        return jnp.asarray(x, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, model.shapes)


def decoder(name):
    family = FAMILIES[name]
    return family.build(family.read_config({**SIZES, "model_type": name, **MODELS[name]}), head="none")


def images(seed, count=8):
    return {"pixel_values": jax.random.normal(jax.random.key(seed), (count, 3, 8, 8))}


@pytest.fixture(scope="module")
def of_vit():
    """A model, its parameters, ranges of 4 bits, and what it is with one range for all channels."""
    config = ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=(8, 8),
        patch_size=(4, 4),
        labels=tuple("abcde"),
    )
    model = vit(config, head="classifier")
    params = drawn(model, 1)
    ranges = pj.calibrate.activation_ranges(model, params, [images(1), images(3)], bits=4, weight_bits=4)
    return model, params, ranges, pj.calibrate.reparameterize(model, params, ranges)


def some_ranges(symmetric, bits=4):
    """Ranges of channels as no calibration would give them."""
    found = {}
    for name in ("attention", "feed_forward"):
        scale = jnp.asarray(np.exp(RNG.standard_normal((LAYERS, WIDTH))), jnp.float32)
        zero = None if symmetric else jnp.asarray(RNG.integers(-3, 19, scale.shape), jnp.float32)
        found[name] = Uniform(scale, zero, bits)
    return found


def normalized(model, norm, layer, h):
    """What a norm gives, in NumPy's float64."""
    config = model.block.config
    scale = np.asarray(norm["scale"][layer], np.float64)
    h = h - h.mean(-1, keepdims=True) if config.norm == "layer" else h
    unit = h / np.sqrt(np.mean(h**2, -1, keepdims=True) + config.norm_epsilon)
    bias = np.asarray(norm["bias"][layer], np.float64) if "bias" in norm else 0.0
    return unit * (scale + (config.norm == "rms_plus_one")) + bias


@pytest.mark.parametrize("name", MODELS)
def test_all_that_reads_a_norm_is_the_same_function_and_its_codes_are_the_same(name):
    model = decoder(name)
    params, symmetric = drawn(model), model.block.config.norm != "layer"
    ranges = some_ranges(symmetric)
    found = pj.calibrate.reparameterize(model, params, ranges)
    h = RNG.standard_normal((50, WIDTH))
    read = 0
    for branch, layers in READERS.items():
        old, new = (p["blocks"][f"{branch}_norm"] for p in (params, found.params))
        own, one = ranges[branch], found.ranges[branch]
        assert one.scale.shape == (LAYERS,)
        assert (one.zero is None) == symmetric
        least, greatest = found.factors[branch]
        assert 0 < least < 1 < greatest
        for layer in range(LAYERS):
            x, moved = (normalized(model, norm, layer, h) for norm in (old, new))
            assert np.abs(x - moved).max() > 0.1
            units = np.asarray(x) / np.asarray(own.scale[layer], np.float64)
            codes = np.round(units) + (0 if symmetric else np.asarray(own.zero[layer]))
            of_one = np.round(moved / float(one.scale[layer])) + (0 if symmetric else float(one.zero[layer]))
            sure = np.abs(np.abs(units % 1 - 0.5)) > 1e-4
            np.testing.assert_array_equal(codes[sure], of_one[sure])
            for reader in set(layers) & params["blocks"][branch].keys():
                was, now = (
                    h @ np.asarray(p["kernel"][layer], np.float64) + np.asarray(p.get("bias", [0, 0])[layer])
                    for p, h in (
                        (params["blocks"][branch][reader], x),
                        (found.params["blocks"][branch][reader], moved),
                    )
                )
                np.testing.assert_allclose(now, was, atol=1e-5 * np.abs(was).max())
                read += 1
    assert read == LAYERS * (("qkv" in params["blocks"]["attention"]) * -2 + 4 + model.block.config.gated)
    rest = {name: part for name, part in found.params["blocks"].items() if "norm" not in name}
    assert rest["feed_forward"]["down"] is params["blocks"]["feed_forward"]["down"]


@pytest.mark.slow
@pytest.mark.parametrize("name", quick_at(["vit", "gemma2", "gpt2"], 0))
def test_the_whole_model_is_the_same_function(name, request):
    if name == "vit":
        model, params, _, found = request.getfixturevalue("of_vit")
        batch = images(7)
    else:
        model = decoder(name)
        params, batch = drawn(model), {"input_ids": RNG.integers(1, 19, (2, 6))}
        found = pj.calibrate.reparameterize(model, params, some_ranges(name != "gpt2"))
    run = jax.jit(model)
    want = run(params, batch)
    np.testing.assert_allclose(run(found.params, batch), want, atol=1e-5 * float(jnp.abs(want).max()))


def test_channels_that_share_a_range_stay_as_they_are():
    model = decoder("gpt2")
    params = drawn(model)
    same = Uniform(jnp.full((LAYERS, WIDTH), 0.3), jnp.full((LAYERS, WIDTH), 5.0), 4)
    found = pj.calibrate.reparameterize(model, params, {"attention": same, "feed_forward": same})
    assert found.factors == {"attention": (1.0, 1.0), "feed_forward": (1.0, 1.0)}
    for new, old in zip(jax.tree.leaves(found.params), jax.tree.leaves(params)):
        np.testing.assert_allclose(new, old, rtol=1e-6)


@pytest.mark.slow
def test_one_range_is_as_good_as_one_of_each_channel_and_one_for_unlike_channels_is_not(of_vit):
    model, params, ranges, found = of_vit
    for name in ("attention", "feed_forward"):
        assert found.factors[name][1] / found.factors[name][0] > 10
    naive = pj.calibrate.activation_ranges(model, params, [images(1), images(3)], bits=4, channels=False)
    naive["attention_weights"] = ranges["attention_weights"]
    rows = pj.quantized(format="int4", group=-1, search=20)
    batch = images(9, 64)
    methods = [pj.chain(rows, pj.rounded_activations(ranges=own)) for own in (found.ranges, naive)]
    run = jax.jit(
        lambda frozen, batch: pj.adapt(methods[0].model(model))(
            methods[0].apply(frozen, {"quantized": {}, "rounded_activations": {}}), batch
        )
    )
    want = jax.jit(model)(params, batch)
    errors = []
    for method, own in zip(methods, (found.params, params)):
        frozen, _ = method.init(KEY, own)
        kernel = frozen.params["blocks"]["attention"]["query"]["kernel"]
        # A scale for each output, of the weights as they are now.
        assert kernel.codes.scales.shape == (LAYERS, WIDTH, 1)
        largest = jnp.abs(own["blocks"]["attention"]["query"]["kernel"]).max(1)
        assert np.all(kernel.codes.scales[..., 0] * 7 <= 1.001 * largest)
        errors.append(float(jnp.mean((run(frozen, batch) - want) ** 2)))
    assert errors[0] < 0.5 * errors[1], errors
    # As a file of options has it.
    again = pj.build(json.loads(json.dumps(pj.describe(methods[0]))))
    for new, old in zip(*(jax.tree.leaves(m.init(KEY, found.params)[0].state) for m in (again, methods[0]))):
        np.testing.assert_array_equal(new, old)


@pytest.mark.parametrize("length", quick_at([5, 140], 0))
def test_rounded_weights_of_attention_are_codes_of_the_softmax_and_hidden_keys_stay_hidden(length):
    rng = np.random.default_rng(0)
    query, key, value = (jnp.asarray(rng.standard_normal((2, length, 2, 4)), jnp.float32) for _ in range(3))
    mask = jnp.ones((2, length), bool).at[0, 3:].set(False)
    codes = LogSqrt2(jnp.float32(0.9), 3)
    prefix = {"keys": jnp.asarray(rng.standard_normal((2, 8))), "values": jnp.ones((2, 8))}
    for before in (None, prefix):
        got = attend(query, key, value, mask=mask, prefix=before, codes=codes)
        keys, values, seen = (np.asarray(x, np.float64) for x in (key, value, mask))
        if before is not None:
            more = [
                np.broadcast_to(np.reshape(before[n], (1, 2, 2, 4)), (2, 2, 2, 4)) for n in ("keys", "values")
            ]
            keys, values = (np.concatenate(pair, 1) for pair in zip((keys, values), more))
            seen = np.concatenate([seen, np.ones((2, 2))], 1)
        scores = np.einsum("btnh,bsnh->bnts", np.asarray(query, np.float64), keys) / 2
        weights = np.exp(scores) * seen[:, None, None]
        weights /= weights.sum(-1, keepdims=True)
        with np.errstate(divide="ignore"):
            exponents = np.minimum(-2 * np.log2(weights / 0.9), 1000)
        q = np.clip(np.round(exponents), 0, 7)
        sure = np.all(np.abs(exponents % 1 - 0.5) > 1e-4, -1).transpose(0, 2, 1)
        assert sure.mean() > 0.9
        rounded = np.where(q == 7, 0, 0.9 * 2 ** (-q / 2))
        assert not np.any(rounded[0, ..., 3:length])
        want = np.einsum("bnts,bsnh->btnh", rounded, values)
        np.testing.assert_allclose(got[sure], want[sure], atol=1e-5)


@pytest.mark.slow
def test_what_cannot_be_done_is_said_with_the_remedy(of_vit):
    model, params, ranges, _ = of_vit
    calibrate, rounded = pj.calibrate, pj.rounded_activations
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    post = bert(BertConfig(vocab_size=19, **small), head="none")
    llama, t5 = decoder("llama"), tiny_t5.make()[0]
    coded = pj.quantized(format="int4", group=4).init(KEY, params)[0].params
    per_tensor = {**ranges, "attention": dataclasses.replace(ranges["attention"], scale=jnp.ones(2))}
    one = {"attention": ranges["attention"]}
    said = [
        (lambda: calibrate.activation_ranges(post, {}, [{}]), "residual stream too.*channels=False"),
        (lambda: calibrate.activation_ranges(t5, {}, [{}]), "encoder-decoder"),
        (lambda: calibrate.activation_ranges(model, params, []), "there is no batch"),
        (lambda: calibrate.activation_ranges(model, params, [], bits=9), "bits must be one of 2, 3"),
        (lambda: calibrate.reparameterize(model, coded, ranges), "is a Quantized, which cannot be rescaled"),
        (lambda: calibrate.reparameterize(llama, drawn(llama), one), "zero points.*symmetric=True"),
        (
            lambda: calibrate.reparameterize(model, params, {"feed_forward": per_tensor["attention"]}),
            "channels=True",
        ),
        (lambda: rescaled("f", model, params, {"attention": (jnp.ones((3, 16)), None)}), r"\[3, 16\] layers"),
        (
            lambda: calibrate.migrate_outliers(model, params, ranges, strength=1.0),
            r"strength must be in \[0, 1\)",
        ),
        (lambda: rounded(ranges=one), "ranges are of attention, attention_output"),
        (lambda: rounded(ranges=ranges, bits=8), "bits is 8, and the ranges are of 4"),
        (lambda: rounded(ranges={**ranges, "attention": {"bits": 4, "scale": ["x"]}}), "has no numbers"),
        (lambda: rounded(ranges={**ranges, "attention": {"bits": 4}}), "is of no layers"),
        (lambda: rounded(ranges={**ranges, "attention": ranges["attention_weights"]}), "is no Uniform"),
        (lambda: rounded(train=True), "train moves known ranges"),
        (lambda: rounded(ranges=ranges, clip=0.5), "clip is of ranges of tokens"),
        (
            lambda: rounded(ranges=ranges).init(KEY, drawn(dataclasses.replace(llama, num_layers=3))),
            "calibrate this",
        ),
        (
            lambda: pj.chain(rounded(), pj.coded_residuals()).model(model),
            "both change what enters a linear layer",
        ),
    ]
    for call, words in said:
        with pytest.raises(PeftError, match=words):
            call()


@pytest.mark.slow
def test_padding_does_not_count_and_norms_without_a_bias_have_no_zero_points():
    model = decoder("llama")
    params = drawn(model)
    ids = np.random.default_rng(1).integers(1, 19, (2, 6))
    mask = np.ones((2, 6), np.int32)
    mask[0, 4:] = 0
    ranges = [
        pj.calibrate.activation_ranges(
            model,
            params,
            [{"input_ids": np.where(mask, ids, fill), "attention_mask": mask}],
            bits=8,
            weight_bits=8,
        )
        for fill in (0, 5)
    ]
    for left, right in zip(*map(jax.tree.leaves, ranges)):
        np.testing.assert_allclose(left, right, rtol=1e-5)
    assert ranges[0]["attention"].zero is None
    assert ranges[0]["attention_output"].zero is not None
    assert float(ranges[0]["attention_weights"].scale.max()) > 0.99  # the first token sees itself alone
    found = pj.calibrate.reparameterize(model, params, ranges[0])
    method = pj.chain(pj.rounded_activations(ranges=found.ranges), pj.lora(rank=2))
    frozen, trainable = method.init(KEY, found.params)
    batch = {"input_ids": ids, "attention_mask": mask}

    @jax.jit
    def loss(trainable, frozen):
        out = pj.adapt(method.model(model))(method.apply(frozen, trainable), batch)
        return jnp.sum(jnp.sin(out)), out

    gradient, out = jax.grad(loss, has_aux=True)(trainable, frozen)
    want = jax.jit(model)(params, batch)
    assert float(jnp.abs(out - want)[mask == 1].max()) < 0.2 * float(jnp.abs(want).max())
    assert all(np.any(g["b"]) for g in gradient["lora"].values())


@pytest.mark.slow
def test_norms_after_the_branches_have_one_range_for_all_channels():
    config = BertConfig(
        vocab_size=19, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    model = bert(config, head="none")
    params, batch = drawn(model), {"input_ids": RNG.integers(1, 19, (4, 6))}
    ranges = pj.calibrate.activation_ranges(model, params, [batch], bits=8, channels=False)
    assert {own.scale.shape for own in ranges.values()} == {(LAYERS,)}
    method = pj.rounded_activations(ranges=ranges)
    frozen, _ = method.init(KEY, params)
    got, want = jax.jit(method.model(model))(method.apply(frozen, {}), batch), jax.jit(model)(params, batch)
    error = float(jnp.mean((got - want) ** 2) / jnp.mean(want**2))
    assert 0 < error < 0.01
    with pytest.raises(PeftError, match="channels=True"):
        pj.calibrate.reparameterize(model, params, ranges)


@pytest.mark.slow
def test_outliers_go_to_the_weights_by_the_equation(of_vit):
    model, params, ranges, _ = of_vit
    found = pj.calibrate.migrate_outliers(model, params, ranges, strength=0.7)
    run, batch = jax.jit(model), images(7)
    want = run(params, batch)
    np.testing.assert_allclose(run(found.params, batch), want, atol=1e-5 * float(jnp.abs(want).max()))
    own = ranges["attention"]
    low, high = -own.zero * own.scale, (15 - own.zero) * own.scale
    attention = params["blocks"]["attention"]
    largest = np.max([np.abs(attention[n]["kernel"]).max(-1) for n in ("query", "key", "value")], 0)
    ratio = np.maximum(np.abs(low), np.abs(high)) ** 0.7 / largest**0.3
    new, old = (p["blocks"]["attention"]["key"]["kernel"] for p in (found.params, params))
    np.testing.assert_allclose(new, old * ratio[..., None], rtol=1e-5)
    assert found.factors["attention"] == pytest.approx((ratio.min(), ratio.max()), rel=1e-5)
    one = found.ranges["attention"]
    np.testing.assert_allclose(one.scale * 15, (high / ratio).max(-1) - (low / ratio).min(-1), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_backward_keeps_what_it_keeps_without_rounding(name):
    model = decoder(name)
    params, batch = drawn(model), {"input_ids": RNG.integers(1, 19, (16, 6))}
    rounded = pj.rounded_activations(weight_bits=4)
    kept = []
    for method in (pj.lora(rank=2), pj.chain(rounded, pj.lora(rank=2))):
        frozen, trainable = method.init(KEY, params)

        def loss(trainable, frozen=frozen, method=method):
            return jnp.sum(pj.adapt(method.model(model))(method.apply(frozen, trainable), batch))

        kept.append(nbytes(kept_arrays(loss, trainable)))
    assert kept[1] <= kept[0] + 1000, kept  # the shares


def hidden_after(model, params, batch):
    """The hidden states after the last block."""
    return model.run_blocks(params, *model.run_embed(params, batch))


@pytest.mark.slow
def test_one_range_of_all_channels_gives_what_one_of_each_gives(of_vit):
    model, params, ranges, found = of_vit
    outs = []
    for own, where in ((ranges, params), (found.ranges, found.params)):
        method = pj.rounded_activations(ranges=own)
        frozen, _ = method.init(KEY, where)
        run = jax.jit(lambda frozen, m=method: m.model(model)(m.apply(frozen, {}), images(9, 64)))
        outs.append(np.asarray(run(frozen)))
    same = np.abs(outs[0] - outs[1]).max(-1) < 1e-5 * np.abs(outs[0]).max()
    assert same.mean() > 0.9  # a number in the middle of two codes may go either way
    assert np.abs(outs[0] - np.asarray(jax.jit(model)(params, images(9, 64)))).max() > 1e-3


@pytest.mark.slow
def test_ends_of_ranges_are_trained_block_by_block_and_then_made_one(of_vit):
    model, params, ranges, _ = of_vit
    method = pj.rounded_activations(ranges=ranges, train=True)
    frozen, start = method.init(KEY, params)
    for old, new in zip(jax.tree.leaves(ranges), jax.tree.leaves(learned_ranges(ranges, frozen, start))):
        np.testing.assert_array_equal(old, new)
    tx = optax.adam(optax.cosine_decay_schedule(1e-2, 40))
    batches = [images(1), images(3)]
    options = {"steps": 40, "key": KEY, "progress": False}
    learned = pj.calibrate.reconstruct(method, model, params, batches, tx, **options)
    assert all(after < before for before, after in zip(learned.before, learned.after)), learned[2:]
    # Of the whole model, from its definition: each block has had its own ranges.
    run = jax.jit(lambda model_params, batch: hidden_after(method.model(model), model_params, batch))
    plain = jax.jit(lambda model_params, batch: hidden_after(model, model_params, batch))
    applied = method.apply(learned.frozen, learned.trainable)
    errors = [jnp.sum((run(applied, b) - plain(params, b)) ** 2, -1).mean() for b in batches]
    assert float(np.mean(errors)) == pytest.approx(learned.after[-1], rel=1e-3)
    new = learned_ranges(ranges, learned.frozen, learned.trainable)
    assert not np.array_equal(new["attention"].scale, ranges["attention"].scale)
    found = pj.calibrate.reparameterize(model, params, new)
    # Rounded weights, too, learn to give what the blocks gave, from rounded activations.
    both = pj.chain(pj.flexround(format="int3", group=-1), pj.rounded_activations(ranges=found.ranges))
    again = pj.calibrate.reconstruct(both, model, found.params, batches, tx, **options)
    assert all(after < before for before, after in zip(again.before, again.after)), again[2:]
