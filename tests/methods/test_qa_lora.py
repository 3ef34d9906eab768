"""QA-LoRA: adapters that zero points can hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import KEY, noisy

import peftjax as pj
from peftjax.core import tree
from peftjax.core.errors import PeftError
from peftjax.methods.quantization.qa_lora import into_zeros
from peftjax.planner.residuals import kept_arrays
from peftjax.testing.comparisons import assert_close
from peftjax.testing.weights import check_weight
from peftjax.weights.quantized import Quantized

PARAMS = {"layers": {"up": {"kernel": jax.random.normal(KEY, (2, 44, 12)).at[:, :8, 3].set(0)}}}


def test_it_merges_into_the_zero_points_and_leaves_the_codes():
    """Also groups of zeros, and a last group that is cut short."""
    method = pj.qa_lora(rank=3, format="int3", group=8)
    frozen, fresh = method.init(KEY, PARAMS)
    base = pj.quantized(format="int3", group=8, affine=True)
    assert_close(method.merge(frozen, fresh), base.merge(*base.init(KEY, PARAMS)))
    assert tree.count(fresh) == 2 * 3 * (6 + 12)
    trained = noisy(fresh)
    merged = into_zeros(method.apply(frozen, trained))["layers"]["up"]["kernel"]
    assert isinstance(merged, Quantized)
    old = frozen.params["layers"]["up"]["kernel"].codes
    np.testing.assert_array_equal(merged.codes.codes, old.codes)
    assert merged.codes.zeros.dtype == jnp.float32
    added = merged.dense() - frozen.params["layers"]["up"]["kernel"].dense()
    assert np.abs(added).max() > 0.05
    assert_close(merged.dense(), method.merge(frozen, trained)["layers"]["up"]["kernel"], 1e-5)
    x = jax.random.normal(KEY, (5, 44))
    run = pj.adapt(lambda p, x: jnp.einsum("ni,lio->lno", x, p["layers"]["up"]["kernel"]))
    out = run(method.apply(frozen, trained), x)
    assert_close(run({"layers": {"up": {"kernel": merged}}}, x), out, 1e-4)


@pytest.mark.slow
def test_a_model_uses_it_as_the_dense_array():
    method = pj.qa_lora(rank=2, group=8, targets="w")
    frozen, fresh = method.init(KEY, {"w": PARAMS["layers"]["up"]["kernel"][0]})
    check_weight(method.apply(frozen, noisy(fresh))["w"])


def test_backward_keeps_sums_of_the_input():
    method = pj.qa_lora(rank=2, group=8, targets="w")
    frozen, trainable = method.init(KEY, {"w": jax.random.normal(KEY, (128, 96))})

    def out(trainable, x, frozen):
        return jnp.sum(pj.adapt(lambda p, x: (3 * x) @ p["w"])(method.apply(frozen, trainable), x) ** 2)

    found = {array.shape for array in kept_arrays(out, trainable, jnp.ones((7, 128)), frozen)}
    assert any(int(np.prod(shape)) == 7 * 16 for shape in found), found
    assert not any(int(np.prod(shape)) >= 7 * 128 for shape in found), found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"affine": False}, "set affine=True"),
        ({"format": "nf4"}, "no zero point"),
        ({"dropout": 0.1}, "dropout"),
    ],
)
def test_errors(options, message):
    with pytest.raises(PeftError, match=message):
        pj.qa_lora(**options)
