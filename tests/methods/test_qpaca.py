"""QPaCA: trained rows of a base of codes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import KEY, all_but_slow, made_shapes, noisy

import peftjax as pj
from peftjax.core import tree
from peftjax.planner.residuals import kept_arrays
from peftjax.quantize.formats import FORMATS
from peftjax.testing.comparisons import assert_close
from peftjax.weights.layout import Layout
from peftjax.weights.quantized import quantize
from peftjax.weights.rows import rows_of

PARAMS = {
    "up": {"kernel": jax.random.normal(KEY, (128, 24))},
    "down": {"kernel": jax.random.normal(KEY, (24, 8))},
}
X = jax.random.normal(KEY, (5, 128))


def model(params, x):
    return jnp.tanh(0.1 * x @ params["up"]["kernel"]) @ params["down"]["kernel"]


def loss(params, x):
    return jnp.sum(jnp.sin(model(params, x)))


@pytest.mark.parametrize("name", all_but_slow(FORMATS, ("nf4", "int8")))
def test_rows_across_the_codes_are_those_of_the_decoded_array(name):
    """Also where groups run on, or are cut short; a number past the end is a row of zeros."""
    rows = jnp.array([0, 5, 69, 2**31 - 1])

    @jax.jit
    def both(weights):
        found = []
        for letters, w in weights.items():
            layout = Layout.parse(letters, w.shape, "w")
            coded = quantize(w, layout, FORMATS[name])
            own = jnp.stack([rows, rows[::-1]]) if "s" in letters else rows
            found.append((rows_of(coded, layout, own), rows_of(coded.dense(), layout, own)))
        return found

    shapes = {"io": (70, 6), "oi": (6, 70), "sio": (2, 70, 6)}
    for found, wanted in both({letters: jax.random.normal(KEY, shape) for letters, shape in shapes.items()}):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.slow
def test_it_starts_as_the_base_of_codes_and_its_gradients_are_rows_of_the_dense_ones():
    method = pj.qpaca(rank=3, alpha=6.0)
    frozen, fresh = method.init(KEY, PARAMS)
    base = pj.nf4()
    rounded = base.merge(*base.init(KEY, PARAMS))
    rows = {path: frozen.state[path]["rows"] for path in fresh}
    before = [np.array(leaf).tobytes() for leaf in jax.tree.leaves(frozen)]

    @jax.jit
    def found(trainable, frozen, x):
        return jax.value_and_grad(lambda t, x: pj.adapt(loss)(method.apply(frozen, t), x), (0, 1))(
            trainable, x
        )

    of_base = pj.adapt(model)(base.apply(*base.init(KEY, PARAMS)), X)
    np.testing.assert_array_equal(pj.adapt(model)(method.apply(frozen, fresh), X), of_base)
    moved = noisy(fresh)
    merged = method.merge(frozen, moved)
    value, (of_values, of_x) = found(moved, frozen, X)
    wanted, (of_dense, of_dense_x) = jax.value_and_grad(loss, (0, 1))(merged, X)
    assert_close((value, of_x), (wanted, of_dense_x))
    for path, gradient in tree.named_leaves(of_dense).items():
        assert_close(of_values[path]["values"], 2.0 * gradient[rows[path]])
        dense, own = tree.named_leaves(merged)[path], tree.named_leaves(rounded)[path]
        assert_close(dense[rows[path]], 2.0 * moved[path]["values"])
        np.testing.assert_array_equal(np.delete(dense, rows[path], 0), np.delete(own, rows[path], 0))
    assert [np.array(leaf).tobytes() for leaf in jax.tree.leaves(frozen)] == before
    chained = pj.chain(pj.nf4(), pj.paca(rank=3, alpha=6.0))
    assert_close(chained.merge(*chained.init(KEY, PARAMS)), rounded)


@pytest.mark.slow
def test_rows_from_before_the_coding_have_no_rounding_error():
    method = pj.qpaca(rank=3, format="int4", scales=None, group=8, init_from="original", targets=["down"])
    frozen, trainable = method.init(KEY, PARAMS)
    error = method.merge(frozen, trainable)["down"]["kernel"] - PARAMS["down"]["kernel"]
    rows = frozen.state["down/kernel"]["rows"]
    assert np.abs(error[rows]).max() < 1e-6
    assert np.abs(np.delete(error, rows, 0)).max(-1).min() > 1e-3


@pytest.mark.slow
def test_backward_keeps_the_trained_inputs_and_only_old_rows_are_decoded():
    method = pj.qpaca(rank=2, targets="w")
    frozen, trainable = method.init(KEY, {"w": jax.random.normal(KEY, (256, 192))})

    def out(trainable, x, frozen):
        return jnp.sum(pj.adapt(lambda p, x: jnp.sin(x) @ p["w"])(method.apply(frozen, trainable), x) ** 2)

    found = kept_arrays(out, trainable, jnp.ones((7, 256)), frozen)
    assert (7, 2) in {array.shape for array in found}
    assert not {(256, 192), (192, 256)} & {array.shape for array in found}
    w = frozen.params["w"]
    rows = jax.make_jaxpr(lambda w: rows_of(w, w.layout, jnp.array([3, 200])))(w).jaxpr
    assert max(int(np.prod(shape)) for shape in made_shapes(rows)) <= 192 * 128
