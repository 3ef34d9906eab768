"""Adapters mixed per row find the batch axis, or ask for it: never another axis of a size that fits."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from support import KEY, assert_close, noisy, normal

import peftjax as pj
from peftjax.core.errors import PeftError

BASE = {"w": 0.3 * normal(KEY, (8, 6))}
METHOD = pj.lora(rank=2, targets=".*")
FROZEN, START = METHOD.init(KEY, BASE)
TRAINED = [noisy(START, jax.random.key(seed)) for seed in range(2)]
ROWS = jnp.array([0, 1, 1, 0])


def mixed(axis=None):
    return pj.adapters.mix([(METHOD, FROZEN, trained) for trained in TRAINED], ROWS, axis=axis)["w"]


def wanted(x):  # batch first
    dense = jnp.stack([METHOD.merge(FROZEN, trained)["w"] for trained in TRAINED])[ROWS]
    return jnp.einsum("b...i,bio->b...o", x, dense)


def product(w, x):
    return x @ w


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [4, 5, 8])
@pytest.mark.parametrize("axis", [0, 1])
def test_the_batch_is_where_it_is_said_to_be(axis, tokens):
    x = jax.random.normal(KEY, (4, tokens, 8))
    given = jnp.moveaxis(x, 0, axis)
    assert_close(jnp.moveaxis(pj.adapt(product)(mixed(axis), given), axis, 0), wanted(x), 1e-5)
    flat = pj.adapt(product)(mixed(axis), given.reshape(-1, 8))
    assert_close(jnp.moveaxis(flat.reshape(*given.shape[:2], 6), axis, 0), wanted(x), 1e-5)


def test_the_only_axis_of_its_size_is_the_batch():
    x = jax.random.normal(KEY, (4, 8, 8))
    assert_close(pj.adapt(product)(mixed(), x), wanted(x), 1e-5)
    turned = pj.adapt(product)(mixed(), x.swapaxes(0, 1))
    assert_close(turned.swapaxes(0, 1), wanted(x), 1e-5)
    ids = jnp.arange(20).reshape(4, 5) % 8
    table = jax.nn.one_hot(ids, 8)
    rows = pj.adapt(lambda w, ids: w[ids])(mixed(), ids.T)
    assert_close(rows.swapaxes(0, 1), wanted(table), 1e-5)


@pytest.mark.parametrize("shape", [(4, 4, 8), (20, 8), (8, 3, 8)])
def test_a_batch_that_cannot_be_told_is_asked_for(shape):
    with pytest.raises(PeftError, match=r"w: adapters are mixed over a batch of 4 rows.*axis=0"):
        pj.adapt(product)(mixed(), jnp.ones(shape))


def divided(spec):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    return jax.shard_map(product, mesh=mesh, in_specs=(P(), spec), out_specs=spec)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [2, 3, 4])  # 2: half of the batch; 4: the batch
@pytest.mark.parametrize("axis", [0, 1])
def test_rows_are_divided_with_the_batch_in_a_shard_map(axis, tokens):
    x = jax.random.normal(KEY, (4, tokens, 8))
    given = jnp.moveaxis(x, 0, axis)
    spec = P("data") if axis == 0 else P(None, "data")
    out = jax.jit(pj.adapt(divided(spec)))(mixed(axis), given)
    assert_close(jnp.moveaxis(out, axis, 0), wanted(x), 1e-5)
    if axis == 1 and tokens % 2:
        return  # a part of a row of tokens
    flat = given.reshape(-1, 8)
    out = jax.jit(pj.adapt(divided(P("data"))))(mixed(axis), flat).reshape(*given.shape[:2], 6)
    assert_close(jnp.moveaxis(out, axis, 0), wanted(x), 1e-5)


def test_a_sequence_that_is_divided_leaves_the_rows_whole():
    x = jax.random.normal(KEY, (4, 6, 8))
    out = jax.jit(pj.adapt(divided(P(None, "data"))))(mixed(), x)
    assert_close(out, wanted(x), 1e-5)


@pytest.mark.parametrize("shape", [(4, 4, 8), (8, 8)])
def test_a_divided_batch_that_cannot_be_told_is_asked_for(shape):
    with pytest.raises(PeftError, match=r"w: adapters .* of 4 rows, and shard_map.*axis=0"):
        pj.adapt(divided(P("data")))(mixed(), jnp.ones(shape))


def test_a_divided_array_that_may_be_the_batch_or_not_is_an_error():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    both = jax.shard_map(
        lambda w, x, other: x @ w + other.sum(),
        mesh=mesh,
        in_specs=(P(), P(), P("data")),
        out_specs=P("data"),
    )
    with pytest.raises(PeftError, match=r"w: .* axes of that size in several ways.* inside of it"):
        pj.adapt(both)(mixed(0), jnp.ones((4, 3, 8)), jnp.ones((4, 5)))
