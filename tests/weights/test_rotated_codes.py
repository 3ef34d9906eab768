"""Codes of rotated weights."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support import KEY, assert_close, normal, quick_at

import peftjax as pj
from peftjax.core.errors import PeftError
from peftjax.quantize.formats import FORMATS
from peftjax.quantize.hadamard import rotated
from peftjax.weights.quantized import Quantized

METHODS = {
    "nf4": lambda **options: pj.nf4(double="none", **options),
    "int4": lambda **options: pj.quantized(format="int4", group=32, **options),
    "int3": lambda **options: pj.quantized(format="int3", **options),
    "bcq2": lambda **options: pj.quantized(format="bcq2", group=64, **options),
}
OUTLIERS = np.where(np.arange(192)[:, None] % 48 == 0, 12.0, 1.0)
"""The rows of a weight [192, 64] whose numbers are large."""


def params_of(shape=(192, 64)):
    return {"up": {"kernel": normal(KEY, shape) * OUTLIERS[: shape[-2]]}}


def kernel(method, params):
    return method.init(KEY, params)[0].params["up"]["kernel"]


@pytest.mark.parametrize("name", quick_at(METHODS, 1))
def test_they_are_those_of_the_rotated_weight(name):
    params = params_of()
    w = params["up"]["kernel"]
    found = kernel(METHODS[name](rotate=True), params)
    plain = kernel(METHODS[name](), {"up": {"kernel": rotated(w.T).T}})
    same = np.asarray(found.codes.codes == plain.codes.codes).mean()
    assert same > 0.999  # the same program adds up in another order
    assert_close(found.dense(), rotated(plain.dense().T).T, 2e-2)
    x = normal(jax.random.key(1), (5, 192))
    out = jax.jit(pj.adapt(lambda w, x: x @ w))(found, x)
    assert_close(out, x @ found.dense(), 1e-5)
    wrong = np.asarray(x @ kernel(METHODS[name](), params).dense() - x @ w)
    assert np.linalg.norm(np.asarray(out - x @ w)) < 0.9 * np.linalg.norm(wrong)


def test_a_lora_on_them_trains_as_on_the_decoded_array_and_merges():
    params, x = params_of(), normal(jax.random.key(1), (5, 192))
    method = pj.chain(METHODS["int4"](rotate=True), pj.lora(rank=2))
    frozen, trainable = method.init(KEY, params)
    trainable = jax.tree.map(lambda leaf: leaf + 0.1, trainable)
    dense = {"up": {"kernel": frozen.params["up"]["kernel"].dense()}}
    run = pj.adapt(lambda params, x: jnp.sum(jnp.sin(x @ params["up"]["kernel"])))

    def grads(base):
        loss = lambda trainable, x: run(method.apply(replace(frozen, params=base), trainable), x)
        return jax.jit(jax.grad(loss, (0, 1)))(trainable, x)

    assert_close(grads(frozen.params), grads(dense), 1e-4)
    merged, errors = method.merge(frozen, trainable, keep_dense=False)
    assert isinstance(merged["up"]["kernel"], Quantized)
    assert merged["up"]["kernel"].rotates
    whole = method.merge(frozen, trainable)["up"]["kernel"]
    error = jnp.linalg.norm(merged["up"]["kernel"].dense() - whole) / jnp.linalg.norm(whole)
    np.testing.assert_allclose(errors["up/kernel"].of_weight, error, rtol=1e-3)
    assert error < 0.2


def test_views_of_outputs_are_codes_and_of_inputs_are_not():
    w = kernel(METHODS["int4"](rotate=True), params_of())
    part = w.slice_features(1, range(8, 24))
    assert_close(part.dense(), w.dense()[:, 8:24], 1e-6)
    assert w.slice_features(0, range(32)) is None
    assert w.part_specs(P("x", None)) is None
    assert w.part_specs(P(None, "x")) is not None
    pick = jax.jit(pj.adapt(lambda w, n: (w[n], w[:, n], w.T @ jnp.ones(192))))
    n = jnp.array([3, 60])
    assert_close(pick(w, n), (w.dense()[n], w.dense()[:, n], w.dense().T @ jnp.ones(192)), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", ["nf4", "int4"])
def test_they_are_the_same_on_eight_devices(name, kind):
    params, x = {"up": {"kernel": normal(KEY, (3, 192, 64)) * OUTLIERS}}, normal(jax.random.key(1), (8, 192))
    method = pj.chain(METHODS[name](rotate=True), pj.lora(rank=2))
    run = jax.jit(pj.adapt(lambda params, x: jnp.sin(jnp.einsum("bi,lio->lbo", x, params["up"]["kernel"]))))
    wanted = run(method.apply(*method.init(KEY, params)), x)
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(kind,) * 2)
    with jax.set_mesh(mesh):
        spread = jax.device_put(params, NamedSharding(mesh, P(None, "data", "tensor")))
        frozen, trainable = method.init(KEY, spread)
        got = run(method.apply(frozen, trainable), jax.device_put(x, NamedSharding(mesh, P("data"))))
    assert_close(got, wanted, 1e-5)


def test_what_trains_the_rounding_refuses_it():
    with pytest.raises(PeftError, match=r"quantized: rotate is .* leave train out"):
        pj.quantized(train=True, rotate=True)
    assert not any(form.rotate for form in FORMATS.values())
