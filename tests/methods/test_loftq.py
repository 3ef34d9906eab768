"""LoftQ: factors that start from what quantization loses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import KEY

import peftjax as pj
from peftjax.testing.comparisons import assert_close

W = {"blocks": {"up": {"kernel": jax.random.normal(KEY, (2, 96, 64))}}}
RANK = 8


def errors(params):
    """The distance to the original of each matrix of the stack."""
    kernel = params["blocks"]["up"]["kernel"] - W["blocks"]["up"]["kernel"]
    return np.linalg.norm(np.asarray(kernel, np.float64), axis=(-2, -1))


def merged(method, params=W):
    return method.merge(*method.init(KEY, params))


@pytest.mark.slow
@pytest.mark.parametrize("form", [{"format": "nf4"}, {"format": "int2", "scales": None}], ids=["nf4", "int2"])
def test_it_starts_nearer_than_rounding_and_more_steps_are_never_worse(form):
    scales = {"scales": "double"} if form["format"] == "nf4" else {}
    plain = errors(merged(pj.quantized(format=form["format"], **scales)))
    for start in ("zero", "principal"):
        found = [
            errors(merged(pj.loftq(rank=RANK, iterations=steps, start=start, **form))) for steps in (1, 2, 5)
        ]
        assert all((later <= earlier * (1 + 1e-6)).all() for earlier, later in zip([plain, *found], found))
        if start == "zero":
            assert (found[0] < 0.95 * plain).all()
            assert (found[-1] < found[0]).all()


@pytest.mark.slow
def test_one_step_is_the_svd_of_what_rounding_loses():
    method = pj.loftq(rank=RANK, iterations=1, targets="w", scales=None)
    w = W["blocks"]["up"]["kernel"][0]
    frozen, trainable = method.init(KEY, {"w": w})
    base = pj.nf4(double="none", targets="w")
    plain, _ = base.init(KEY, {"w": w})
    rounded = plain.params["w"].dense()
    for ours, theirs in zip(jax.tree.leaves(frozen.params), jax.tree.leaves(plain.params)):
        np.testing.assert_array_equal(ours, theirs)
    u, sizes, vt = np.linalg.svd(np.asarray(w - rounded, np.float64), full_matrices=False)
    a, b = trainable["w"]["a"], trainable["w"]["b"]
    assert_close(2.0 * a.T @ b, (u[:, :RANK] * sizes[:RANK]) @ vt[:RANK], 1e-4)
    out = pj.adapt(lambda p, x: x @ p["w"])(method.apply(frozen, trainable), jnp.eye(96))
    assert_close(out, method.merge(frozen, trainable)["w"], 1e-5)
