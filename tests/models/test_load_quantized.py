"""Loading into codes: bit for bit what the method makes of the loaded arrays, in less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from support import all_but_slow

import peftjax as pj
from peftjax.core.errors import PeftError
from peftjax.models.load import load
from peftjax.models.save import save
from peftjax.weights.quantized import Quantized

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_key_value_heads": 4, "vocab_size": 64}


@pytest.fixture(scope="module")
def folder(decoders, random_decoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("floats")
    save(folder, *random_decoder({**decoders["llama2"], **SIZES}))
    return folder


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


METHODS = {
    "nf4": pj.nf4(),  # 96 inputs are no whole blocks of 64: they run on
    "float8": pj.nf4(double="float8", group=32),
    "affine": pj.quantized(format="int4", affine=True, group=32),
    "int2": pj.quantized(format="int2"),
    "nvfp4": pj.quantized(format="nvfp4", targets=["embedding", "query", "down"]),
}


@pytest.mark.parametrize("name", all_but_slow(METHODS, ("nf4",)))
def test_codes_are_those_of_the_method_bit_for_bit(folder, name):
    method, dtype = METHODS[name], "bfloat16" if name == "nf4" else "float32"
    _, floats = load(folder, head="causal_lm", param_dtype=dtype)
    _, coded = load(folder, head="causal_lm", param_dtype=dtype, quantize=method)
    expected = method.init(jax.random.key(0), floats)[0].params
    same(coded, expected)
    same(method.init(jax.random.key(0), coded)[0].params, expected)


@pytest.mark.slow
def test_a_chain_on_coded_parameters_trains_and_tells_another_format(folder):
    model, coded = load(folder, head="causal_lm", quantize=pj.nf4())
    _, floats = load(folder, head="causal_lm")
    method = pj.chain(pj.nf4(), pj.lora(rank=2))
    frozen, trainable = method.init(jax.random.key(0), coded)
    same((frozen, trainable), method.init(jax.random.key(0), floats))
    ids = jnp.arange(12).reshape(2, 6)
    batch = {"input_ids": ids, "labels": ids}

    def loss(trainable):
        outputs = pj.adapt(model)(method.apply(frozen, trainable), batch)
        return pj.losses.cross_entropy(outputs, batch)

    gradients = jax.jit(jax.grad(loss))(trainable)
    assert all(float(jnp.abs(slot["b"]).max()) > 0 for slot in gradients["lora"].values())
    with pytest.raises(
        PeftError, match=r"kernel' is coded already, as nf4 with a double .*leave quantized out"
    ):
        pj.quantized(format="int8").init(jax.random.key(0), coded)
    with pytest.raises(PeftError, match=r"is a Quantized, and a file has arrays: merge"):
        save(folder, model, coded)
    with pytest.raises(PeftError, match=r"nothing but code weights.*'lora'"):
        load(folder, quantize=pj.lora())


@pytest.mark.slow
@pytest.mark.parametrize("of_layers", [False, True])
def test_codes_go_where_the_weights_go(folder, of_layers):
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    method = pj.quantized(format="int8")

    def sharding(path, shape):
        if not path.endswith("kernel") or len(shape) < 3:
            return NamedSharding(mesh, PartitionSpec())
        return NamedSharding(mesh, PartitionSpec(None, *(("x",) if of_layers else ("x", "y"))))

    _, coded = load(folder, head="causal_lm", sharding=sharding, quantize=method)
    same(coded, load(folder, head="causal_lm", quantize=method)[1])
    up = coded["blocks"]["feed_forward"]["up"]["kernel"]
    assert isinstance(up, Quantized)
    assert up.codes.codes.sharding.spec == (
        PartitionSpec(None, None, "x") if of_layers else PartitionSpec(None, "y", "x")
    )
