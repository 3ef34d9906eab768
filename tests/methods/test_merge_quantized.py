"""Merging into codes: the nearest codes of the merged weight, and the error that they make."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import quick_at

import peftjax as pj
from peftjax.quantize.encoding import encode
from peftjax.weights.quantized import Quantized

KEY = jax.random.key(0)


@pytest.mark.parametrize(
    "base", quick_at([pj.nf4(), pj.quantized(format="int8")], 1), ids=lambda base: base.name
)
def test_merged_codes_are_those_of_the_dense_merge(base):
    params = {
        "blocks": {
            "up": {"kernel": jax.random.normal(KEY, (2, 128, 24), jnp.bfloat16), "bias": jnp.ones((2, 24))}
        },
        "down": {"kernel": jax.random.normal(KEY, (64, 16))},
    }
    method = pj.chain(base, pj.lora(rank=2, targets=["up"]))
    frozen, trainable = method.init(KEY, params)
    trainable = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(KEY, x.shape), trainable)
    exact = jnp.float32(pj.dense(method.apply(frozen, trainable)["blocks"]["up"]["kernel"].cast(jnp.float32)))
    coded, errors = method.merge(frozen, trainable, keep_dense=False, safe=True)
    assert list(errors) == ["blocks/up/kernel"]
    kernel, old = coded["blocks"]["up"]["kernel"], frozen.params["blocks"]["up"]["kernel"]
    assert jax.tree.structure(coded) == jax.tree.structure(frozen.params)
    assert coded["down"]["kernel"] is frozen.params["down"]["kernel"]
    np.testing.assert_array_equal(coded["blocks"]["up"]["bias"], params["blocks"]["up"]["bias"])
    assert isinstance(kernel, Quantized)
    assert kernel.dtype == jnp.bfloat16
    wanted = jax.jit(jax.vmap(lambda w: encode(w.T, old.codes.format)))(exact)
    wanted = replace(kernel.codes, codes=wanted.codes, scales=wanted.scales)
    jax.tree.map(np.testing.assert_array_equal, kernel.codes, wanted)
    left = np.linalg.norm(exact - pj.dense(kernel.cast(jnp.float32)))
    error = errors["blocks/up/kernel"]
    np.testing.assert_allclose(error.of_weight, left / np.linalg.norm(exact), rtol=1e-5)
    change = np.linalg.norm(exact - pj.dense(old.cast(jnp.float32)))
    np.testing.assert_allclose(error.of_change, left / change, rtol=1e-5)
    assert 0 < error.of_weight < (0.12 if base.name == "nf4" else 0.01)
    dense = method.merge(frozen, trainable)
    assert dense["blocks"]["up"]["kernel"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(dense["blocks"]["up"]["kernel"], exact.astype(jnp.bfloat16))
    again, none = method.merge(frozen, jax.tree.map(jnp.zeros_like, trainable), keep_dense=False)
    assert (
        none["blocks/up/kernel"].of_weight < 1e-2
    )  # decoded weights have codes, up to their scales' rounding
    np.testing.assert_array_equal(again["blocks"]["up"]["kernel"].codes.codes, old.codes.codes)
