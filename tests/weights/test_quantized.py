"""The quantized weight: views, what a lookup decodes, what backward keeps, shards, checkpoints."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from support import KEY, all_but_slow, assert_close, made_shapes

import peftjax as pj
from peftjax.core import tree
from peftjax.planner.residuals import kept_arrays
from peftjax.quantize.formats import FORMATS
from peftjax.testing.weights import check_weight
from peftjax.weights.layout import Layout
from peftjax.weights.quantized import Quantized, quantize

DOUBLE = replace(FORMATS["nf4"], scales="double")
RNG = np.random.default_rng(3)


def normal(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def coded(letters, *shape, form=DOUBLE, rows="o", name="up/kernel"):
    w = normal(*shape)
    return jax.jit(lambda w: quantize(w, Layout.parse(letters, shape, name), form, rows=rows))(w)


@pytest.mark.parametrize("name", all_but_slow(FORMATS, ("int8",)))
def test_a_model_uses_it_as_the_decoded_array(name):
    check_weight(coded("io", 128, 24, form=FORMATS[name]))
    check_weight(coded("sio", 3, 20, 6, form=FORMATS[name]))  # groups that run on, or are cut short


@pytest.mark.slow
def test_views_are_those_of_the_decoded_array():
    """Slices of rows and of whole groups, heads as a stack, a reversed axis: still codes."""
    w = coded("ioo", 128, 4, 16)
    dense, x = w.dense(), normal(5, 128)
    uses = {
        "rows": lambda w: x @ w.reshape(128, 64)[:, 3:40:2],
        "groups": lambda w: x[:, 64:] @ w.reshape(128, 64)[64:],
        "heads": lambda w: jnp.einsum("ni,ihd->nhd", x, w[:, ::-1]),
        "heads first": lambda w: jnp.einsum("ni,hid->hnd", x, jnp.moveaxis(w, 1, 0)),
    }
    for what, use in uses.items():
        assert_close(pj.adapt(use)(w), use(dense), 1e-5, what=what)
    with pytest.raises(pj.PeftError, match="up/kernel"):
        pj.adapt(lambda w: x[:, :100] @ w.reshape(128, 64)[:100])(w)  # a cut through a group


def test_a_lookup_decodes_the_rows_it_finds():
    w = coded("io", 1000, 64, rows="i", name="words/embedding")
    tokens = jnp.array([[3, 999], [0, 3]])
    look = pj.adapt(lambda w: w[tokens])
    np.testing.assert_array_equal(jax.jit(look)(w), w.dense()[tokens])
    floats = [
        shape
        for shape in made_shapes(jax.make_jaxpr(look)(w).jaxpr)
        if np.prod(shape, dtype=int) >= 1000 * 64
    ]
    assert not floats


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_backward_keeps_the_input_of_the_adapter_and_nothing_of_the_weights_size(dtype):
    params = {
        "up": {"kernel": normal(256, 192).astype(dtype)},
        "down": {"kernel": normal(192, 256).astype(dtype)},
    }
    method = pj.chain(pj.nf4(), pj.lora(rank=2))
    frozen, trainable = method.init(KEY, params)

    def loss(trainable, frozen, x):
        run = pj.adapt(lambda params, x: jnp.tanh(x @ params["up"]["kernel"]) @ params["down"]["kernel"])
        return jnp.sum(run(method.apply(frozen, trainable), x).astype(jnp.float32) ** 2)

    found = kept_arrays(loss, trainable, frozen, normal(4, 256).astype(dtype))
    assert all(np.prod(array.shape, dtype=int) <= 4 * 256 for array in found), found


@pytest.mark.slow
def test_codes_and_scales_are_sharded_as_the_weight_is():
    """And the step is that of one device, for inputs, outputs and stacks that are divided."""
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "tensor"))
    w, x = 0.02 * normal(3, 512, 128), normal(8, 512)
    method = pj.chain(pj.nf4(), pj.lora(rank=2))

    def step(frozen, trainable, x):
        def loss(trainable):
            def layers(params, x):
                return jax.lax.scan(
                    lambda x, w: (jnp.tanh(x @ w @ w.T), None), x, params["blocks"]["kernel"]
                )[0]

            return jnp.sum(pj.adapt(layers)(method.apply(frozen, trainable), x) ** 2)

        return jax.value_and_grad(loss)(trainable)

    alone = method.init(KEY, {"blocks": {"kernel": w}})
    want = jax.jit(step)(*alone, x)
    for spec in (
        PartitionSpec(None, "tensor"),
        PartitionSpec(None, None, "tensor"),
        PartitionSpec(None, "data", "tensor"),
    ):
        placed = {"blocks": {"kernel": jax.device_put(w, NamedSharding(mesh, spec))}}
        frozen, trainable = method.init(KEY, placed)
        codes = frozen.params["blocks"]["kernel"].codes
        one = alone[0].params["blocks"]["kernel"].codes
        np.testing.assert_array_equal(codes.codes, one.codes)
        parts = 8 if len(spec) == 3 and spec[1] else 4
        for array in (codes.codes, codes.scales.codes):
            assert array.addressable_shards[0].data.size * parts == array.size
        got = jax.jit(step)(frozen, trainable, jax.device_put(x, NamedSharding(mesh, PartitionSpec("data"))))
        assert_close(got, want, 1e-5)


@pytest.mark.slow
def test_shards_of_one_device_are_weights_of_their_own():
    """Inside `shard_map`, with scales that are coded twice too."""
    mesh = jax.make_mesh((4,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
    w, x = coded("io", 256, 64), normal(6, 256)

    def product(w, x):
        inner = jax.shard_map(
            lambda w, x: jax.lax.psum(x @ w, "tensor"),
            mesh=mesh,
            in_specs=(PartitionSpec("tensor"), PartitionSpec(None, "tensor")),
            out_specs=PartitionSpec(),
        )
        return inner(w, x)

    assert_close(jax.jit(pj.adapt(product))(w, x), x @ w.dense(), 1e-5)
    two = replace(FORMATS["bcq2"], group=64)
    w = coded("io", 256, 64, form=two)
    assert_close(jax.jit(pj.adapt(product))(w, x), x @ w.dense(), 1e-5)
    with pytest.raises(pj.PeftError, match="codes of 3 bits lie in two parts"):
        pj.adapt(product)(coded("io", 256, 64, form=FORMATS["int3"]), x)
    with pytest.raises(pj.PeftError, match="no whole groups of 128"):  # a scale each, of the wrong groups
        pj.adapt(product)(coded("io", 256, 64, form=replace(FORMATS["bcq4"], group=128)), x)


@pytest.mark.slow
def test_orbax_keeps_the_codes(tmp_path):
    """A tree with codes of every kind comes back to the bit, in as many bytes."""
    kinds = ("nf4", "int8", "fp8_e5m2", "mxfp4", "nvfp4", "bcq3")
    weights = {name: coded("sio", 2, 64, 16, form=FORMATS[name]) for name in kinds}
    weights["double"] = coded("sio", 2, 64, 16)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "base", weights)
        checkpointer.wait_until_finished()
        again = checkpointer.restore(tmp_path / "base", jax.eval_shape(lambda: weights))
    assert jax.tree.structure(again) == jax.tree.structure(weights)
    assert isinstance(again["nf4"], Quantized)
    for left, right in zip(jax.tree.leaves(again), jax.tree.leaves(weights)):
        assert left.dtype == right.dtype
        assert np.asarray(left).tobytes() == np.asarray(right).tobytes()
    assert tree.nbytes(again["nf4"]) == 2 * (64 * 16 // 2 + 16 * 4)
