import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from support import assert_no_dense_gradient, noisy
from tiny_t5 import VALUES, make, token_batch, values

import peftjax as pj
from peftjax.core.errors import PeftError
from peftjax.io.safetensors import find_tensors, read_tensors, write_tensors
from peftjax.models.load import load
from peftjax.models.save import save
from peftjax.models.t5 import decoder_ids, last_eos, t5
from peftjax.models.t5_config import read_config
from peftjax.models.t5_positions import RelativeBias, bucket_of

FLAN = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}


@pytest.fixture(scope="module")
def flan():
    return make(**FLAN)


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def close(a, b, tolerance=1e-4):
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(b))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=tolerance * scale), a, b)


def loss(model, batch, key=None):
    return lambda params: jnp.sum(jnp.sin(jnp.asarray(model(params, batch, key=key)).astype(jnp.float32)))


def test_parameter_paths_are_the_contract(flan):
    attention = lambda name: {f"{name}/{part}/kernel" for part in ("query", "key", "value", "output")}
    encoder = attention("attention") | {f"feed_forward/{name}/kernel" for name in ("gate", "up", "down")}
    encoder |= {"attention_norm/scale", "feed_forward_norm/scale"}
    decoder = encoder | attention("cross_attention") | {"cross_attention_norm/scale"}
    expected = {f"embed/{name}/embedding" for name in ("word", "encoder_positions", "decoder_positions")}
    expected |= {f"encoder/blocks/{name}" for name in encoder} | {f"blocks/{name}" for name in decoder}
    expected |= {"encoder/head/norm/scale", "head/norm/scale", "head/output/kernel"}
    shapes = {path: leaf.shape for path, leaf in flatten_dict(flan[1], sep="/").items()}
    assert set(shapes) == expected
    assert shapes["encoder/blocks/attention/query/kernel"] == (2, 16, 12)
    assert shapes["blocks/cross_attention/output/kernel"] == (3, 12, 16)
    assert set(make("mean")[1]) == {"embed", "blocks", "head"}


@pytest.mark.slow
def test_new_kernels_are_scaled_by_what_they_sum_over():
    model = t5(read_config(values(d_model=64, d_kv=16, d_ff=256)))
    blocks = jax.jit(model.init)(jax.random.key(0))["blocks"]
    deviation = lambda *names: float(blocks[names[0]][names[1]]["kernel"].std())
    for branch in ("attention", "cross_attention"):
        np.testing.assert_allclose(deviation(branch, "query"), (64 * 16) ** -0.5, rtol=0.05)
        np.testing.assert_allclose(deviation(branch, "key"), 64**-0.5, rtol=0.05)
        np.testing.assert_allclose(deviation(branch, "output"), 32**-0.5, rtol=0.05)
    np.testing.assert_allclose(deviation("feed_forward", "up"), 64**-0.5, rtol=0.05)
    np.testing.assert_allclose(deviation("feed_forward", "down"), 256**-0.5, rtol=0.05)


@pytest.mark.slow
def test_scan_equals_a_loop_over_the_block_parts(flan):
    model, params = flan
    batch = token_batch(left=True)
    hidden, context = model.run_embed(params, batch)
    assert context.encoded.shape == (2, 9, 16)
    for layer in range(model.num_layers):
        weights = {"params": jax.tree.map(lambda x: x[layer], params["blocks"])}  # noqa: B023
        call = lambda method, *args: model.block.apply(weights, *args, method=method)  # noqa: B023
        for branch in ("attention", "cross_attention", "feed_forward"):
            inputs = () if branch == "feed_forward" else (context,)
            update = call(f"{branch}_branch", hidden, *inputs)
            assert jnp.abs(update).max() > 0
            hidden = call(f"{branch}_join", hidden, update)
            assert call(f"normalize_{branch}", hidden).shape == hidden.shape
    close(model(params, batch).hidden, model.run_head(params, hidden, context).hidden)


def test_the_bias_is_a_table_of_the_distances():
    length = 21
    places = np.arange(length)
    for both_sides in (True, False):
        settings = {"buckets": 8, "farthest": 12, "both_sides": both_sides}
        module = RelativeBias(heads=3, init_std=1.0, dtype=jnp.float32, **settings)
        variables = module.init(jax.random.key(0), length)
        rows = bucket_of((places[None] - places[:, None]).ravel(), **settings).reshape(length, length)
        expected = np.asarray(variables["params"]["embedding"])[rows].transpose(2, 0, 1)
        np.testing.assert_array_equal(module.apply(variables, length)[0], expected)
    assert bucket_of(np.array([-300, -12, -1, 0, 1, 3, 300]), **settings).tolist() == [7, 7, 1, 0, 0, 0, 0]


def test_backward_keeps_the_bias_once_and_no_attention_weights(flan):
    model, params = flan
    batch = token_batch(length=70, target=66)
    kept = jax.eval_shape(lambda params: jax.vjp(loss(model, batch), params)[1], params)
    shapes = [leaf.shape for leaf in jax.tree.leaves(kept)]
    squares = [shape for shape in shapes if shape[-2:] in ((70, 70), (66, 66), (66, 70)) and len(shape) > 2]
    assert sorted(squares) == [(1, 2, 66, 66), (1, 2, 70, 70)]


def test_padding_of_the_text_does_not_matter(flan):
    model, params = flan
    batch = token_batch(length=8)
    other = batch["input_ids"] + 7 * (1 - batch["attention_mask"])
    logits = jax.jit(lambda batch: model(params, batch).dense())
    close(logits(batch), logits({**batch, "input_ids": other}), 1e-6)
    unmasked = {**batch, "attention_mask": np.ones_like(other)}
    assert jnp.abs(logits(batch) - logits(unmasked)).max() > 1e-2


@pytest.mark.slow
def test_the_gradient_is_of_the_masks_that_were_drawn():
    model, params = make("mean", **FLAN)
    value_and_gradient = jax.jit(
        jax.value_and_grad(lambda params, key: loss(model, token_batch(), key)(params))
    )
    key = jax.random.key(3)
    value, gradients = value_and_gradient(params, key)
    assert value != value_and_gradient(params, jax.random.key(4))[0]
    step = 1e-3 / jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(gradients)))
    ends = [jax.tree.map(lambda p, g: p + sign * step * g, params, gradients) for sign in (1, -1)]  # noqa: B023
    rise = value_and_gradient(ends[0], key)[0] - value_and_gradient(ends[1], key)[0]
    np.testing.assert_allclose(rise, 2e-3 * 1e-3 / step, rtol=0.02)


def test_every_dropout_of_transformers_is_there(flan):
    """2 around each stack, one after each branch, on the weights of each attention, and inside each F."""

    def draws(jaxpr):
        for equation in jaxpr.eqns:
            yield from [1] * (equation.primitive.name == "random_bits")
            for value in jax.tree.leaves(equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns")):
                inner = getattr(value, "jaxpr", value)
                yield from draws(inner) if hasattr(inner, "eqns") else ()

    model, params = flan
    traced = jax.make_jaxpr(loss(model, token_batch(), jax.random.key(0)))(params)
    assert sum(draws(traced.jaxpr)) == (2 + 2 + 1 + 1) + (2 + 3 + 2 + 1)


@pytest.mark.slow
def test_remat_reaches_both_stacks(flan):
    model = dataclasses.replace(flan[0], remat="nothing_saveable")
    function = loss(model, token_batch())
    kept = jax.eval_shape(lambda params: jax.vjp(function, params)[1], flan[1])
    shapes = [leaf.shape for leaf in jax.tree.leaves(kept)]
    assert [shape for shape in shapes if shape[:2] in ((2, 2), (3, 2))] == [(2, 2, 9, 16), (3, 2, 5, 16)]


@pytest.mark.slow
def test_bfloat16_stays_near_float32(flan):
    model, params = flan
    half = dataclasses.replace(model, dtype="bfloat16")
    assert half.encoder.embed.dtype == jnp.bfloat16
    exact, near = (jax.jit(m)(params, token_batch()).dense() for m in (model, half))
    assert near.dtype == jnp.bfloat16
    assert jnp.abs(near.astype(jnp.float32) - exact).mean() < 0.05 * jnp.abs(exact).max()


@pytest.mark.slow
@pytest.mark.parametrize("head", ["seq2seq_lm", "classifier"])
def test_lora_of_all_linear_layers(head):
    model, params = make(head, **FLAN, num_labels=3)
    batch = {name: jnp.asarray(value) for name, value in token_batch(length=11, target=11).items()}
    forward = lambda params, batch: jnp.asarray(model(params, batch))
    method = pj.lora(rank=2, targets="all-linear")
    _, trainable = method.init(jax.random.key(0), params)
    adapted = " ".join(trainable)
    assert all(f"{stack}attention/query" in adapted for stack in ("encoder/blocks/", "blocks/cross_"))
    assert_no_dense_gradient(forward, params, method, batch)
    if head == "seq2seq_lm":
        frozen, trainable = method.init(jax.random.key(0), params)
        trainable = noisy(trainable)
        merged = jax.jit(forward)(method.merge(frozen, trainable), batch)
        close(jax.jit(pj.adapt(forward))(method.apply(frozen, trainable), batch), merged, 5e-5)


SAVED = {"seq2seq_lm": FLAN, "none": {}, "classifier": {}, "encoder": FLAN, "mean": {}}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["t5", "mt5"])
@pytest.mark.parametrize("head", SAVED)
def test_saved_and_loaded_bit_for_bit(head, kind, tmp_path):
    model, params = make(head, model_type=kind, **SAVED[head])
    save(tmp_path, model, params)
    again, loaded = load(tmp_path, head=head)
    equal(loaded, params)
    fields = ("tied", "scaled_output", "gated", "activation", "decoder_start_token_id", "labels")
    assert all(getattr(again.config, name) == getattr(model.config, name) for name in fields)


def test_names_are_those_of_transformers(tmp_path):
    for gated, names in ((False, ["wi", "wo"]), (True, ["wi_0", "wi_1", "wo"])):
        save(tmp_path, *make("none", feed_forward_proj="gated-silu" if gated else "relu"))
        found = set(find_tensors(tmp_path))
        dense = "encoder.block.1.layer.1.DenseReluDense."
        assert sorted(n.removeprefix(dense) for n in found if n.startswith(dense)) == [
            f"{name}.weight" for name in names
        ]
        assert {
            "shared.weight",
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            "decoder.block.2.layer.1.EncDecAttention.o.weight",
            "decoder.block.2.layer.2.layer_norm.weight",
            "decoder.final_layer_norm.weight",
        } <= found
        assert not any("block.1" in name and "relative" in name for name in found)


@pytest.mark.slow
def test_the_encoder_alone_of_a_whole_checkpoint(flan, tmp_path):
    model, params = flan
    save(tmp_path, model, params)
    batch = token_batch()
    encoder, own = load(tmp_path, head="encoder")
    states = encoder(own, batch)
    np.testing.assert_array_equal(states, model.run_embed(params, batch)[1].encoded)
    mask = batch["attention_mask"][..., None]
    mean = load(tmp_path, head="mean")
    np.testing.assert_allclose(mean[0](mean[1], batch), (states * mask).sum(1) / mask.sum(1), atol=1e-5)


def test_tensors_decide_whether_the_output_layer_is_the_table(flan, tmp_path):
    """transformers 5 calls every T5 tied in config.json, and saves the output layer where it is not."""
    save(tmp_path, *flan)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "tie_word_embeddings": True}))
    model, params = load(tmp_path, head="seq2seq_lm")
    assert not model.config.tied
    assert not model.config.scaled_output
    equal(params, flan[1])
    tensors = dict(read_tensors(find_tensors(tmp_path)))
    tensors["lm_head.weight"] = tensors["shared.weight"]
    write_tensors(tmp_path / "model.safetensors", tensors)
    model, params = load(tmp_path, head="seq2seq_lm")
    assert model.config.tied
    assert "output" not in params["head"]


@pytest.mark.slow
def test_a_classifier_is_drawn_on_a_pretrained_model(flan, tmp_path):
    save(tmp_path, *flan)
    with pytest.raises(PeftError, match=r"head/classifier/dense/bias.*pass key="):
        load(tmp_path, head="classifier", num_labels=3)
    model, params = load(tmp_path, head="classifier", num_labels=3, key=jax.random.key(0))
    logits = model(params, token_batch(target=9))
    assert logits.shape == (2, 3)
    with pytest.raises(PeftError, match="9 input_ids, 5 decoder_input_ids"):
        model(params, token_batch())


def test_decoder_ids_are_the_labels_one_place_on():
    config = read_config(values(decoder_start_token_id=3, pad_token_id=0))
    batch = {"labels": jnp.array([[5, 6, 1], [7, 1, -100]]), "input_ids": jnp.array([[8, 1], [9, 1]])}
    assert decoder_ids(config, batch, "seq2seq_lm").tolist() == [[3, 5, 6], [3, 7, 1]]
    assert decoder_ids(config, {"labels": jnp.array([[-100, 4]])}, "none").tolist() == [[3, 0]]
    assert decoder_ids(config, batch, "classifier").tolist() == [[3, 8], [3, 9]]
    with pytest.raises(PeftError, match="no decoder_input_ids, and no labels"):
        decoder_ids(config, {"input_ids": batch["input_ids"]}, "none")
    without = read_config(values(decoder_start_token_id=None))
    with pytest.raises(PeftError, match="no decoder_start_token_id"):
        decoder_ids(without, batch, "seq2seq_lm")


def test_a_classifier_reads_the_last_eos_else_the_last_token():
    config = read_config(VALUES)
    ids = jnp.array([[5, 1, 6, 1, 0], [5, 6, 7, 0, 0], [1, 4, 4, 4, 4]])
    batch = {"input_ids": ids, "attention_mask": jnp.array([[1] * 4 + [0], [1] * 3 + [0] * 2, [1] * 5])}
    assert last_eos(config, batch, 5).tolist() == [3, 2, 0]
    for eos, places in (([1, 6], [3, 1, 0]), (None, [3, 2, 4])):
        assert last_eos(read_config(values(eos_token_id=eos)), batch, 5).tolist() == places


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feed_forward_proj": "gated-gleu"}, r"feed_forward_proj 'gleu' is not supported; closest: 'gelu'"),
        ({"feed_forward_proj": "twice-gelu"}, "'twice-gelu' is neither an activation"),
        ({"is_decoder": True}, "is_decoder to True"),
        ({"tie_encoder_decoder": True}, "tie_encoder_decoder to True"),
        ({"num_heads": 0}, "num_heads must be a positive integer"),
        ({"dropout_rate": 1.0}, "dropout_rate must be a number"),
        ({"relative_attention_max_distance": 4}, "relative_attention_num_buckets 8"),
    ],
)
def test_settings_that_are_not_computed_are_named(changes, message):
    with pytest.raises(PeftError, match=message):
        read_config(values(**changes))


def test_a_missing_size_and_an_unknown_head_are_named():
    with pytest.raises(PeftError, match=r"config\.json has no d_kv"):
        read_config({name: value for name, value in VALUES.items() if name != "d_kv"})
    with pytest.raises(PeftError, match=r"head 'seq2seq' is not supported; closest: 'seq2seq_lm'"):
        t5(read_config(VALUES), head="seq2seq")
