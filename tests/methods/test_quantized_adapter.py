"""Adapters of few bits: what the model sees, what a file holds, and where such an adapter starts."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from support import KEY, assert_close, noisy, quick_at
from tiny_models import tiny

import peftjax as pj
import peftjax.testing
from peftjax.core import tree
from peftjax.core.errors import PeftError
from peftjax.models.vit import ViTConfig, vit
from peftjax.quantize.normal_codes import NormalCodes, encode_normal, median_table, round_normal

DRAWN = np.random.default_rng(0).standard_normal((2, 16, 16)).astype(np.float32) / 4
PARAMS = {
    "blocks": {"up": {"kernel": jnp.array(DRAWN), "bias": jnp.zeros((2, 16))}},
    "head": {"kernel": jnp.array(DRAWN[0, :, :4], jnp.bfloat16)},
}
X = jnp.array(DRAWN[1])
BI_LORA_32 = 2 * 12 * (2 * 768 * 32 // 8 + 16)


def model(params, x):
    up = params["blocks"]["up"]
    for layer in range(2):
        x = jnp.tanh(x @ up["kernel"][layer] + up["bias"][layer])
    return x @ params["head"]["kernel"].astype(x.dtype)


def quantized(bits=1, **options):
    return pj.quantized_adapter(pj.lora(rank=4, bias="adapted", **options), bits=bits)


@pytest.mark.parametrize("bits", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_file_holds_codes_and_gives_the_same_outputs(bits, tmp_path):
    head = pj.quantized_adapter(pj.unfreeze(["head/kernel"]), bits=2)
    method = pj.chain(quantized(bits), head)
    frozen, fresh = method.init(KEY, PARAMS)
    trained = noisy(fresh)
    run = jax.jit(lambda frozen, trainable: pj.adapt(model)(method.apply(frozen, trainable), X))
    out = run(frozen, trained)
    pj.adapters.save_adapter(tmp_path, method, frozen, trained, seed=0)
    adapter = pj.adapters.load_adapter(tmp_path, PARAMS)
    loaded = adapter.trainable
    assert_close(run(adapter.frozen, loaded), out, 1e-6)  # another program may sum in another order
    assert_close(model(method.merge(frozen, trained), X), out)
    assert_close(model(adapter.method.merge(adapter.frozen, loaded), X), out)
    # Matrices are codes, each layer with its mean and deviation; biases are floats.
    own = loaded["quantized_adapter"]
    assert isinstance(own["blocks/up/kernel"]["a"], NormalCodes)
    np.testing.assert_array_equal(
        own["blocks/up/bias"]["value"], trained["quantized_adapter"]["blocks/up/bias"]["value"]
    )
    assert tree.nbytes(own) == 2 * 2 * (4 * 16 * bits // 8 + 8) + 2 * 16 * 4
    seen = method.merge(frozen, trained)["head"]["kernel"]
    assert seen.dtype == jnp.bfloat16
    assert fresh["quantized_adapter_2"]["head/kernel"].dtype == jnp.float32
    assert len(np.unique(np.asarray(seen, np.float32))) == 4
    assert jax.tree.structure(method.stored(frozen, loaded)) == jax.tree.structure(loaded)


@pytest.mark.slow
def test_the_model_sees_two_values_a_layer_and_an_ordinary_lora_has_them():
    method = quantized()
    frozen, fresh = method.init(KEY, PARAMS)
    trained = noisy(fresh)
    inner, own, values = pj.adapters.rounded(method, frozen, trained)
    assert (inner.name, inner.config["rank"]) == ("lora", 4)
    assert_close(inner.merge(own, values), method.merge(frozen, trained), 0)
    again = pj.adapters.rounded(method, frozen, method.stored(frozen, trained))[2]
    assert_close(again, values, 0)
    for slot in "ab":
        for layer, latent in zip(values["blocks/up/kernel"][slot], trained["blocks/up/kernel"][slot]):
            step = median_table(1)[1] * np.std(latent, ddof=1)
            wanted = np.mean(latent) + step * np.where(latent > np.mean(latent), 1, -1)
            np.testing.assert_allclose(layer, wanted, rtol=1e-5, atol=1e-6)
    assert pj.adapters.rounded(inner, own, values) == (inner, own, values)
    both = pj.chain(pj.nf4(targets=["head/kernel"]), pj.lora(rank=2, targets=["head/kernel"]), method)
    frozen, fresh = both.init(KEY, PARAMS)
    whole, of_floats, values = pj.adapters.rounded(both, frozen, fresh)
    assert list(values) == ["nf4", "lora", "lora_2"]
    assert_close(whole.merge(of_floats, values), both.merge(frozen, fresh), 0)


def test_a_matrix_of_zeros_starts_around_them():
    _, fresh = quantized().init(KEY, PARAMS)
    plain = pj.lora(rank=4, bias="adapted").init(KEY, PARAMS)[1]
    b = np.asarray(fresh["blocks/up/kernel"]["b"])
    assert 5e-4 < b.std() < 1.2e-3
    assert np.abs(b).max() <= 2e-3
    assert np.abs(b[0] - b[1]).max() > 1e-4
    np.testing.assert_array_equal(fresh["blocks/up/kernel"]["a"], plain["blocks/up/kernel"]["a"])
    np.testing.assert_array_equal(fresh["blocks/up/bias"]["value"], 0)


def written(folder, method, params):
    """The bytes of the numbers in the file of an adapter of such parameters."""
    frozen, trainable = jax.eval_shape(lambda p: method.init(KEY, p), params)
    coded = jax.eval_shape(lambda f, t: method.stored(f, t), frozen, trainable)
    coded = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), coded)
    pj.adapters.save_adapter(folder, method, frozen, coded, seed=0)
    data = (folder / "adapter.safetensors").read_bytes()
    return len(data) - 8 - int.from_bytes(data[:8], "little")


@pytest.mark.slow
def test_a_task_takes_the_bytes_of_the_papers_tables(tmp_path):
    """ViT-B/16: 72.2 KiB of Bi-AdaptFormer-32, twice as many of Bi-LoRA-32 in queries and values."""
    base = vit(ViTConfig())
    params = jax.eval_shape(lambda: base.init(KEY))
    bi_lora = pj.quantized_adapter(pj.lora(rank=32, targets=["query", "value"]))
    assert written(tmp_path, bi_lora, params) == BI_LORA_32
    bi_adaptformer = pj.quantized_adapter(pj.adaptformer(size=32, bias=False))
    assert written(tmp_path, bi_adaptformer, params) == BI_LORA_32 // 2 == 73_920
    four = pj.quantized_adapter(pj.adaptformer(size=32), bits=4)
    biases = 12 * 4 * (768 + 32)
    assert written(tmp_path, four, params) == 12 * (2 * 768 * 32 // 2 + 16) + biases


def test_what_cannot_be_coded_is_an_error_and_options_survive_json():
    with pytest.raises(PeftError, match="bits must be one of 1, 2, 4, got 3"):
        pj.quantized_adapter(pj.lora(), bits=3)
    with pytest.raises(PeftError, match="'lowrank_restarts' changes itself"):
        pj.quantized_adapter(pj.lowrank_restarts(rank=2))
    with pytest.raises(PeftError, match="'bitfit' trains no matrix"):
        pj.quantized_adapter(pj.bitfit()).init(KEY, PARAMS)
    method = pj.quantized_adapter(pj.chain(pj.nf4(), pj.lora_plus(rank=2)), bits=2)
    again = pj.build(json.loads(json.dumps(pj.describe(method))))
    assert pj.describe(again) == pj.describe(method)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [1, 2])
def test_training_lowers_the_loss(bits):
    """Of a chain within, whose optimizer is rewritten."""
    method = pj.quantized_adapter(pj.chain(pj.lora_plus(rank=8, ratio=2.0)), bits=bits)
    target = model(jax.tree.map(lambda w: w * 1.3, PARAMS), X)
    batch = jnp.zeros(())

    def loss(params, batch):
        return jnp.mean((pj.adapt(model)(params, X) - target) ** 2)

    training = pj.training(method, loss, optax.adam(3e-3))
    state = training.start(KEY, PARAMS)
    losses = []
    for _ in range(100):
        state, metrics = training.step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("kind", quick_at((AxisType.Explicit, AxisType.Auto), 0))
def test_numbers_divided_over_devices_are_rounded_and_coded_as_those_of_one(kind):
    """With the mean and the deviation of the whole matrix."""
    method = quantized(2)
    frozen, fresh = method.init(KEY, PARAMS)
    trained = noisy(fresh)["blocks/up/kernel"]
    mesh = jax.make_mesh((4,), ("tensor",), axis_types=(kind,))
    divided = jax.tree.map(
        lambda leaf: jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(None, None, "tensor"))), trained
    )
    seen = jax.jit(lambda t: round_normal(t["b"], 1, 2))
    with jax.set_mesh(mesh):
        got = seen(divided)
        codes = method.stored(frozen, {"blocks/up/kernel": divided})["blocks/up/kernel"]["b"]
    assert got.sharding.spec == PartitionSpec(None, None, "tensor")
    assert_close(got, seen(trained))
    np.testing.assert_array_equal(codes.codes, encode_normal(trained["b"], 1, 2).codes)


@pytest.mark.slow
def test_a_method_of_blocks_without_biases_is_trained_in_one_bit():
    method = pj.quantized_adapter(pj.adaptformer(size=3, scale=10.0, bias=False, dropout=0.0))
    backbone = tiny("backbone")
    frozen, fresh = method.init(KEY, backbone.params)
    assert {name.rsplit("/", 1)[-1] for name in tree.named_leaves(fresh)} == {"kernel"}
    coded = method.stored(frozen, fresh)["blocks"]["feed_forward"]["up"]["kernel"]
    assert coded.mean.shape == (len(fresh["blocks"]["feed_forward"]["up"]["kernel"]),)  # of each layer
    pj.testing.check_method(method, backbone, mergeable=False, starts_as_base=False)
