"""Numbers outside the table: a structured weight's lookup fills, clips and trains as its dense array's."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from jax import lax
from support import KEY, all_but_slow, assert_close, combined, noisy, normal

import peftjax as pj
from peftjax.testing.methods import begun
from peftjax.weights.layout import Layout
from peftjax.weights.low_rank import LowRank

TABLE = normal(KEY, (10, 6))
IDS = jnp.array([[1, 9], [3, 12], [0, -30]])
INSIDE = ((IDS >= 0) & (IDS < 10))[..., None]
METHODS = {
    "lora": pj.lora(rank=2, targets=".*"),
    "dora": pj.dora(rank=2, targets=".*"),
    "rows": pj.rows([3, 9], targets=".*"),
    "pissa": pj.pissa(rank=2, targets=".*"),
    "galore": pj.galore(rank=2, targets=".*"),
    "snell": pj.snell(rank=2, targets=".*"),
    "shira": pj.shira(rank=1, targets=".*"),
}
MODES = {
    "fill": {},
    "fill with a number": {"mode": "fill", "fill_value": 3.0},
    "clip": {"mode": "clip"},
    "columns": {"mode": "fill", "fill_value": -1.0},
}


def look_up(table, mode):
    return jnp.take(table.T if mode == "columns" else table, IDS, axis=0, **MODES[mode])


def of_method(name):
    method = METHODS[name]
    frozen, trainable = begun(method, {"embedding": TABLE})
    floats = noisy({"t": [x for x in jax.tree.leaves(trainable) if jnp.issubdtype(x.dtype, jnp.floating)]})
    moved = iter(floats["t"])
    return (
        method,
        frozen,
        jax.tree.map(lambda x: next(moved) if jnp.issubdtype(x.dtype, jnp.floating) else x, trainable),
    )


@pytest.mark.parametrize(("name", "mode"), combined(METHODS, MODES))
def test_a_lookup_outside_the_table_is_that_of_the_merged_table(name, mode):
    method, frozen, trainable = of_method(name)
    got = pj.adapt(functools.partial(look_up, mode=mode))(method.apply(frozen, trainable)["embedding"])
    assert_close(got, look_up(method.merge(frozen, trainable)["embedding"], mode), 1e-5)


@pytest.mark.parametrize("name", all_but_slow(METHODS, ("lora", "rows", "galore")))
def test_rows_that_are_masked_afterwards_leave_finite_and_right_gradients(name):
    method, frozen, trainable = of_method(name)

    def loss(fn, tables):
        # The derivative of the root at a filled row is undefined too, not only the row.
        return lambda t: jnp.sum(jnp.where(INSIDE, jnp.sqrt(2.0 + jnp.tanh(fn(tables(t)["embedding"]))), 0.0))

    def fn(table):
        return look_up(table, "fill")

    def apply(t):
        return method.apply(frozen, t)

    got = jax.grad(loss(pj.adapt(fn), apply), allow_int=True)(trainable)

    def dense(t):  # the very weight, dense: merging may round or stop gradients
        leaf = method.apply(frozen, t)["embedding"]
        return {"embedding": leaf.dense()}

    wanted = jax.grad(loss(fn, dense), allow_int=True)(trainable)
    pairs = list(zip(jax.tree.leaves(got), jax.tree.leaves(wanted)))
    floats = [(g, w) for g, w in pairs if jnp.issubdtype(g.dtype, jnp.floating)]
    assert floats
    assert any(float(jnp.abs(w).max()) > 0 for _, w in floats)
    for g, w in floats:
        assert bool(jnp.isfinite(g).all())
        assert_close(g, w, 1e-4)


@pytest.mark.slow
def test_a_member_outside_the_stack_is_filled_and_poisons_nothing():
    layout = Layout.parse("sio", (3, 6, 4), "experts")
    weight = LowRank(jax.random.normal(KEY, (3, 6, 4)), jnp.ones((3, 2, 6)), jnp.ones((3, 2, 4)), layout, 0.5)
    ids, x = jnp.array([2, 7]), jnp.ones((2, 6))

    def fn(w):
        y = jnp.einsum("ni,nio->no", x, jnp.take(w, ids, axis=0))
        return jnp.where(ids[:, None] < 3, y, 0.0)

    assert_close(pj.adapt(fn)(weight), fn(weight.dense()), 1e-5)
    got = jax.grad(lambda w: jnp.sum(jnp.sin(pj.adapt(fn)(w))))(weight)
    wanted = jax.grad(lambda w: jnp.sum(jnp.sin(fn(w.dense()))))(weight)
    assert_close((got.a, got.b), (wanted.a, wanted.b), 1e-5)


TOKENS = jnp.array([1, 3, 14, -2])
SMALL = jnp.ones((2, 4, 6))
FEW = {
    "under vmap": lambda t: jax.vmap(lambda n: t[n])(TOKENS),
    "under two vmaps": lambda t: jax.vmap(jax.vmap(lambda n: t[n], out_axes=-1))(IDS),
    "windows under vmap": lambda t: jax.vmap(lambda n: lax.dynamic_slice_in_dim(t, n, 4))(TOKENS),
    "in a scan": lambda t: lax.scan(lambda c, n: (c, t[n]), 0, TOKENS)[1],
    "one row": lambda t: t[3],
    "one column": lambda t: t[:, 2],
    "one number": lambda t: t[3, 2],
    "a window from where a cache ends": lambda t: lax.dynamic_slice(t, (TOKENS[1], 0), (4, 6)),
    "positions of a batch": lambda t: t[None, :4] + SMALL,
    "positions without a batch axis": lambda t: SMALL + t[:4],
    "equinox": lambda t: jax.vmap(eqx.nn.Embedding(weight=t))(TOKENS % 10),
}


@pytest.mark.parametrize(("name", "use"), combined(METHODS, FEW))
def test_few_rows_are_plain_and_those_of_the_merged_table(name, use):
    use = FEW[use]
    if name == "dora" and use in (FEW["positions of a batch"], FEW["positions without a batch axis"]):
        pytest.skip("a slice of a table's rows is no weight with DoRA's lengths")
    method, frozen, trainable = of_method(name)
    got = pj.adapt(lambda p: use(p["embedding"]))(method.apply(frozen, trainable))
    assert_close(got, use(method.merge(frozen, trainable)["embedding"]), 1e-5)


def test_the_axes_of_layers_are_not_taken_for_rows():
    layers = {"w": {"q": jnp.ones((3, 6, 6))}}
    uses = [
        lambda p, x: x @ p["w"]["q"][1],
        lambda p, x: x @ lax.dynamic_index_in_dim(p["w"]["q"], TOKENS[0], 0, False),
    ]
    for use in uses:
        assert pj.layouts_of(use, layers, SMALL) == {"^w/q": "sio"}
        method = pj.lora(rank=2, targets=".*", layouts={"q": "ioo"})
        with pytest.raises(pj.PeftError, match="w/q: "):
            pj.adapt(use)(method.apply(*method.init(KEY, layers)), SMALL)
