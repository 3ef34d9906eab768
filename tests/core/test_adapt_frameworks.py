"""The same transforms on plain JAX, Flax Linen, NNX and Equinox: equal to the merged model."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support import (
    KEY,
    all_but_slow,
    assert_close,
    assert_equals_merged,
    assert_no_dense_gradient,
    noisy,
    normal,
)

import peftjax as pj
from peftjax.core import tree

X = normal(KEY, (2, 6, 8))
EVERY = {"rank": 2, "targets": ".*(kernel|embedding|weight)"}
LORA, DORA = pj.lora(alpha=3.0, **EVERY), pj.dora(**EVERY)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x))
        h = nn.gelu(nn.Dense(16)(nn.LayerNorm()(x)))
        return x + nn.Dense(8)(h), None


class Stack(nn.Module):
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block) if self.remat else Block
        scanned = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return scanned()(x, None)[0]


class Convolutions(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), kernel_dilation=2)(x[..., None]))
        x = nn.Conv(8, (3, 3), feature_group_count=2, padding="CIRCULAR")(x)
        return nn.ConvTranspose(4, (2, 2), strides=(2, 2))(x).mean((1, 2))


class Words(nn.Module):
    @nn.compact
    def __call__(self, x):
        embed = nn.Embed(13, 8, name="words")
        x = embed(jnp.argmax(x, -1))
        x = nn.DenseGeneral((2, 4), name="query")(x)
        return embed.attend(nn.DenseGeneral(8, axis=(-2, -1), name="out")(x))


LINEN = {
    "stack-lora": (Stack(), LORA),
    "words-lora": (Words(), LORA),
    "words-dora": (Words(), DORA),
    "convolutions-lora": (Convolutions(), LORA),
    "stack-dora": (Stack(), DORA),
    "remat-lora": (Stack(remat=True), LORA),
    "remat-dora": (Stack(remat=True), DORA),
    "convolutions-dora": (Convolutions(), DORA),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", all_but_slow(LINEN, list(LINEN)[:4]))
def test_linen(name):
    module, method = LINEN[name]
    params = module.init(KEY, X)["params"]
    assert_equals_merged(lambda p, x: module.apply({"params": p}, x), params, method, X)
    assert_no_dense_gradient(lambda p, x: module.apply({"params": p}, x), params, method, X)


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, 8, 8, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 8, rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.down(nnx.gelu(self.up(x)))


class NnxStack(nnx.Module):
    def __init__(self, rngs, remat):
        make = nnx.split_rngs(splits=2)(nnx.vmap(NnxBlock, in_axes=0, out_axes=0))
        self.layers, self.remat = make(rngs), remat

    def __call__(self, x):
        def call(x, layer):
            return layer(x)

        call = nnx.remat(call) if self.remat else call
        return nnx.scan(call, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)


@pytest.mark.slow
@pytest.mark.parametrize("remat", all_but_slow((False, True), (False,)))
def test_nnx_through_split_and_merge(remat):
    definition, state = nnx.split(NnxStack(nnx.Rngs(0), remat))
    assert_equals_merged(lambda s, x: nnx.merge(definition, s)(x), state, LORA, X)
    assert_no_dense_gradient(lambda s, x: nnx.merge(definition, s)(x), state, LORA, X)


class EqxBlock(eqx.Module):
    up: eqx.nn.Linear
    down: eqx.nn.Linear
    attention: eqx.nn.MultiheadAttention
    mix: eqx.nn.Conv1d

    def __init__(self, key):
        keys = jax.random.split(key, 4)
        self.up, self.down = eqx.nn.Linear(8, 16, key=keys[0]), eqx.nn.Linear(16, 8, key=keys[1])
        self.attention = eqx.nn.MultiheadAttention(2, 8, key=keys[2])
        self.mix = eqx.nn.Conv1d(6, 6, 3, padding=1, groups=2, key=keys[3])

    def __call__(self, x):
        x = x + self.attention(x, x, x)
        x = x + self.mix(x)
        return x + jax.vmap(self.down)(jax.nn.relu(jax.vmap(self.up)(x)))


@pytest.mark.slow
@pytest.mark.parametrize("layers", all_but_slow((None, 2), (None,)))
def test_equinox(layers):
    make = EqxBlock if layers is None else eqx.filter_vmap(EqxBlock)
    module = make(KEY if layers is None else jax.random.split(KEY, layers))
    params, static = eqx.partition(module, eqx.is_inexact_array)

    def forward(params, x):
        if layers is None:
            return jax.vmap(eqx.combine(params, static))(x)
        return jax.lax.scan(lambda x, layer: (jax.vmap(eqx.combine(layer, static))(x), None), x, params)[0]

    axes = {"mix/weight": "oii" if layers is None else "soii"}
    assert_equals_merged(forward, params, pj.lora(**EVERY, layouts=axes), X)
    assert_no_dense_gradient(forward, params, pj.lora(**EVERY, layouts=axes), X)
    assert pj.layouts_of(forward, params, X, targets=["mix"]) == {"^mix/weight": axes["mix/weight"]}


def test_layouts_are_found_where_names_do_not_tell():
    class Odd(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.DenseGeneral((2, 4), name="a")(x)
            return nn.DenseGeneral(8, axis=(-2, -1), name="b", use_bias=False)(x)

    params = Odd().init(KEY, X)["params"]

    def forward(params, x):
        return Odd().apply({"params": params}, x)

    found = pj.layouts_of(forward, params, X, targets=".*kernel")
    assert found == {"^a/kernel": "ioo", "^b/kernel": "iio"}
    assert_equals_merged(forward, params, pj.lora(rank=2, targets=".*kernel", layouts=found), X)


def test_bfloat16_module_stays_within_bfloat16():
    module = nn.Dense(8, dtype=jnp.bfloat16)
    params = module.init(KEY, X)["params"]
    method = pj.lora(rank=2, targets=["kernel"])
    frozen, trainable = method.init(KEY, params)
    trainable = noisy(trainable)
    out = pj.adapt(lambda p, x: module.apply({"params": p}, x))(method.apply(frozen, trainable), X)
    assert out.dtype == jnp.bfloat16
    assert_close(out, X @ method.merge(frozen, trainable)["kernel"] + params["bias"], 2e-2)


@pytest.mark.slow
def test_the_trees_keep_their_kind():
    definition, state = nnx.split(NnxBlock(nnx.Rngs(0)))
    method = pj.chain(pj.lora(rank=2), pj.bitfit())
    frozen, trainable = method.init(KEY, state)
    merged = method.merge(frozen, trainable)
    assert jax.tree.structure(merged) == jax.tree.structure(state)
    assert_close(nnx.merge(definition, merged)(X), nnx.merge(definition, state)(X))
    assert tree.count(merged) == tree.count(state)


def test_layouts_of_reads_the_orientation_from_the_use():
    w = jnp.zeros((5, 8))
    x = jnp.zeros((3, 8))
    assert pj.layouts_of(lambda p, x: x @ p["w"].T, {"w": w}, x) == {"^w": "oi"}
    assert pj.layouts_of(lambda p, x: x @ p["w"], {"w": w.T}, x) == {"^w": "io"}
    assert pj.layouts_of(lambda p, x: jnp.einsum("od,bd->bo", p["w"], x), {"w": w}, x) == {"^w": "oi"}
    square = {"w": jnp.zeros((2, 8, 8))}

    def scanned(p, x):
        return jax.lax.scan(lambda x, w: (x @ w.T, None), x, p["w"])[0]

    assert pj.layouts_of(scanned, square, x) == {"^w": "soi"}
    tied = {"embedding": jnp.zeros((9, 8))}
    both = pj.layouts_of(lambda p, i: p["embedding"][i] @ p["embedding"].T, tied, jnp.zeros(3, int))
    assert both == {"^embedding": "io"}
    letters = pj.layouts_of(lambda p, x: x @ p["w"].T, {"w": w}, x)
    trained = pj.dora(rank=2, layouts=letters).init(jax.random.key(0), {"w": w})[1]
    assert trained["w"]["magnitude"].shape == (5,)


@pytest.mark.parametrize("method", [pj.dora, pj.lora_fa, pj.paca])
def test_a_guessed_side_is_held_to_where_the_method_depends_on_it(method):
    """`x @ w.T` of a matrix whose name does not tell that it is [out, in]."""
    params = {"proj": {"w": jax.random.normal(jax.random.key(0), (5, 8))}}
    x = jax.random.normal(jax.random.key(1), (3, 8))

    def transposed(params, x):
        return x @ params["proj"]["w"].T

    def run(fn, x, **options):
        made = method(rank=2, **options)
        frozen, trainable = made.init(jax.random.key(2), params)
        return pj.adapt(fn)(made.apply(frozen, trainable), x)

    with pytest.raises(pj.PeftError, match=r"proj/w: an activation meets the side .*layouts_of"):
        run(transposed, x)
    expected = transposed(params, x)
    for layouts in (pj.layouts_of(transposed, params, x), {"w": "oi"}):
        np.testing.assert_allclose(run(transposed, x, layouts=layouts), expected, atol=1e-5)
    straight = run(lambda params, x: x @ params["proj"]["w"], x[:, :5])
    np.testing.assert_allclose(straight, x[:, :5] @ params["proj"]["w"], atol=1e-5)
