"""Weights with a linear map of activations, and those with a change that is formed in their layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import KEY, assert_close

from peftjax.interpreter import adapt
from peftjax.testing.weights import check_weight
from peftjax.weights.added import Added
from peftjax.weights.layout import Layout
from peftjax.weights.mapped import Mapped


def through(slots, x):
    return x @ slots["m"].astype(x.dtype)


def share_of_base(slots, w):
    return w * (slots["u"] @ slots["v"])


def product(slots):
    return slots["u"] @ slots["v"]


def normal(number, *shape):
    return 0.3 * jax.random.normal(jax.random.fold_in(KEY, number), shape)


def mapped(place, shape, letters, dtype=jnp.float32):
    layout = Layout.parse(letters, shape)
    n, m = layout.matrix
    sizes = {"before": (n, n), "after": (m, m), "beside": (n, m)}[place]
    slots = {"m": normal(1, *layout.stack, *sizes)}
    return Mapped(normal(0, *shape).astype(dtype), slots, layout, through, place)


def added_of_base(shape, letters, dtype=jnp.float32):
    layout = Layout.parse(letters, shape)
    n, m = layout.matrix
    slots = {"u": normal(1, *layout.stack, n, 2), "v": normal(2, *layout.stack, 2, m)}
    return Added(normal(0, *shape).astype(dtype), slots, layout, share_of_base, of_base=True)


def added(shape, letters, dtype=jnp.float32):
    layout = Layout.parse(letters, shape)
    n, m = layout.matrix
    slots = {"u": normal(1, *layout.stack, n, 2), "v": normal(2, *layout.stack, 2, m)}
    return Added(normal(0, *shape).astype(dtype), slots, layout, product)


KINDS = {
    **{place: lambda *args, place=place: mapped(place, *args) for place in ("before", "after", "beside")},
    "added, of the base": added_of_base,
    "added": added,
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_may_use_it_as_the_array_it_stands_for(kind):
    check_weight(KINDS[kind]((6, 10), "io"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_stack_of_it_may_be_used_too(kind):
    check_weight(KINDS[kind]((3, 6, 10), "sio"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("letters", "shape", "equation", "of_x"),
    [
        ("iio", (3, 4, 10), "btij,ijo->bto", (2, 5, 3, 4)),
        ("iio", (3, 4, 10), "bto,ijo->tijb", (2, 5, 10)),
        ("ooi", (2, 5, 6), "bi,hdi->hdb", (4, 6)),
        ("sio", (3, 6, 10), "sbi,sio->bso", (3, 2, 6)),
        ("osi", (10, 3, 6), "bso,osi->bsi", (4, 3, 10)),
    ],
)
def test_products_whatever_the_order_of_the_axes(kind, letters, shape, equation, of_x):
    w, x = KINDS[kind](shape, letters), normal(7, *of_x)

    def use(w, x):
        return jnp.einsum(equation, x, w)

    assert_close(adapt(use)(w, x), use(w.dense(), x), 1e-5)


def test_small_changes_of_a_base_of_16_bits_are_not_rounded_away():
    w = added((16, 8), "io", jnp.bfloat16)
    small = Added(w.base, jax.tree.map(lambda s: 0.02 * s, w.slots), w.layout, product)
    x = jnp.ones((4, 16), jnp.bfloat16)
    got = adapt(lambda w, x: x @ w)(small, x) - x @ small.base
    want = np.ones((4, 16)) @ np.asarray(product(small.slots))
    # Rounded into the base, such a change would be lost, or a whole step of the base's.
    np.testing.assert_allclose(np.asarray(got, np.float32), want, atol=0.03)
