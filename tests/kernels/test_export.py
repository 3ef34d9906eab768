"""Programs with kernels, stored by `jax.export` for other machines and later versions."""

import jax
import jax.numpy as jnp
import pytest
from jax import export
from support import KEY, assert_close, normal

import peftjax as pj
from peftjax.quantize import decode
from peftjax.quantize.affine import encode

X = normal(KEY, (4, 8))


def snell(x):
    method = pj.snell(rank=2)
    frozen, trainable = method.init(KEY, {"up": {"kernel": jnp.ones((8, 16))}})
    return pj.adapt(lambda p, x: jnp.tanh(x @ p["up"]["kernel"]))(method.apply(frozen, trainable), x)


def codes(x):
    return decode(encode(x, 8, group=4))


@pytest.mark.parametrize("platforms", [("cpu", "cuda", "tpu"), ("cuda",), ("tpu",)])
@pytest.mark.parametrize("fn", [snell, codes])
def test_an_export_has_no_kernel_in_it(fn, platforms):
    exported = export.export(jax.jit(fn), platforms=platforms)(X)
    assert not any(name in exported.mlir_module() for name in ("triton", "mosaic", "tpu_custom_call"))
    if "cpu" in platforms:
        assert_close(exported.call(X), fn(X))


def test_an_export_is_stored_with_its_gradient():
    pytest.importorskip("flatbuffers", reason="jax.export stores programs with flatbuffers")
    stored = export.export(jax.jit(snell), platforms=("cpu", "cuda", "tpu"))(X).serialize(vjp_order=1)
    again = export.deserialize(stored).call
    assert_close(again(X), snell(X))
    loss = lambda f: lambda x: jnp.sum(jnp.sin(f(x)))
    assert_close(jax.grad(loss(again))(X), jax.grad(loss(snell))(X))
