"""The in-place form: the base holds the adapted weights when it is closed, as it is between steps."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import KEY, assert_close, normal, quick_at
from tiny_models import moved

import peftjax as pj
from peftjax.adapters.files import load_adapter, save_adapter
from peftjax.core import tree
from peftjax.core.errors import PeftError
from peftjax.train.step import divided

D, F, L = 8, 12, 3
UP, DOWN = (0.3 * normal(jax.random.key(n), shape) for n, shape in ((0, (L, D, F)), (1, (L, F, D))))
PARAMS = {"blocks": {"up": {"kernel": UP}, "down": {"kernel": DOWN}}, "head": {"kernel": jnp.ones((D, 4))}}
X = normal(KEY, (6, D))
OPTIONS = {
    "paca": {"rank": 2, "alpha": 2.0},
    "shira": {"rank": 2},
    "sara": {"density": 0.3, "reselect_at": 2, "penalty": 0.01},
}
METHODS = [pytest.param(name, id=name) for name in OPTIONS]


def make(name, **more):
    return getattr(pj, name)(**{**OPTIONS[name], **more})


def model(params, x):
    def block(x, layer):
        return x + jnp.tanh(x @ layer["up"]["kernel"]) @ layer["down"]["kernel"], None

    return jax.lax.scan(block, x, params["blocks"])[0] @ params["head"]["kernel"]


def begun(method, params, key=KEY):
    """As a loop that has advanced the method starts its first step."""
    frozen, trainable = method.init(key, params)
    return replace(frozen, advanced=True), trainable


def train(method, steps=4, params=PARAMS):
    def loss(params, x):
        return jnp.mean(jnp.sin(pj.adapt(model)(params, x).astype(jnp.float32)))

    training = pj.training(method, loss, optax.adamw(0.02, weight_decay=0.1))
    state = training.start(KEY, params)
    for _ in range(steps):
        state, _ = training.step(state, X)
    return state.frozen, state.trainable


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)])
def test_it_trains_as_the_form_that_is_not_in_place(name, dtype):
    params = jax.tree.map(lambda w: w.astype(dtype), PARAMS)
    method, other = make(name, in_place=True), make(name)
    frozen, trainable = train(method, params=params)
    other_frozen, wanted = train(other, params=params)
    assert (method.in_place, other.in_place) == (True, False)
    assert_close(trainable, wanted, 1e-5 if dtype == jnp.float32 else 5e-2)
    merged = method.merge(frozen, trainable)
    assert_close(merged, other.merge(other_frozen, trainable), 0)
    assert_close(dict(tree.named_leaves(frozen.params)), dict(tree.named_leaves(merged)), 0)


@pytest.mark.parametrize("name", quick_at(OPTIONS, 0))
def test_before_it_is_closed_and_with_older_values_in_it_nothing_is_wrong(name):
    """`apply` on what `init` gave, and `merge` from any frozen, are those of the form not in place."""
    method = make(name, in_place=True)
    frozen, fresh = begun(method, PARAMS)
    trained, older = moved(fresh), moved(fresh, seed=1)
    wanted = make(name).merge(make(name).init(KEY, PARAMS)[0], trained)
    assert_close(pj.adapt(model)(method.apply(frozen, trained), X), model(wanted, X))
    for start in (frozen, method.close(frozen, fresh)[0], method.close(frozen, older)[0]):
        assert_close(method.merge(start, trained), wanted, 0)


@pytest.mark.parametrize("name", METHODS)
def test_going_back_is_exact(name):
    method = make(name, in_place=True)
    frozen, fresh = method.init(KEY, PARAMS)
    trained = moved(fresh)
    closed, kept = method.close(frozen, trained)
    for path, leaf in tree.named_leaves(closed.params).items():
        assert (path == "head/kernel") == np.array_equal(leaf, tree.named_leaves(PARAMS)[path])
    assert_close(method.open(closed, kept), (frozen, trained), 0)
    assert_close(method.open(frozen, trained), (frozen, trained), 0)


WIDTH, DEPTH = 256, 4
LAYERS = {"layers": [{"kernel": jnp.ones((WIDTH, WIDTH))} for _ in range(DEPTH)]}
BATCH = jnp.ones((64, WIDTH))


def deep(params, x):
    for layer in params["layers"]:
        x = jnp.tanh(x @ layer["kernel"])
    return x


def temporaries(method, *, closed=False):
    """Bytes that a gradient needs beside its arguments and its result, as compiled."""
    frozen, trainable = begun(method, LAYERS)
    frozen = method.close(frozen, trainable)[0] if closed else frozen

    def loss(trainable, frozen):
        return jnp.sum(pj.adapt(deep)(method.apply(frozen, trainable), BATCH))

    step = jax.jit(jax.grad(loss)).lower(trainable, frozen).compile()
    return step.memory_analysis().temp_size_in_bytes


def sparse(name):
    """The method with about 2 % of the numbers trained."""
    return make(name, in_place=True, **({"penalty": 0.0, "density": 0.02} if name == "sara" else {}))


@pytest.mark.parametrize("name", ["shira", "sara"])
def test_a_gradient_on_a_closed_base_makes_no_copy_of_a_weight(name):
    method = sparse(name)
    closed, beside = (temporaries(method, closed=closed) for closed in (True, False))
    matrix = 4 * WIDTH**2
    assert closed < beside - matrix / 2
    assert closed < 3 * matrix  # one dense gradient, and the activations


@pytest.mark.parametrize("name", METHODS)
def test_a_step_of_training_makes_no_copy_of_a_weight_and_the_base_has_the_values_after_it(name):
    method, x = sparse(name), jnp.ones((8, WIDTH))
    training = pj.training(method, lambda p, x: jnp.sum(pj.adapt(deep)(p, x)), optax.adam(1e-3))
    state = training.advance(training.start(KEY, LAYERS), x)
    moved, fixed = divided(state.frozen, training.moves)
    step = jax.jit(training.run_step, donate_argnums=(0, 1, 2))
    given = state.trainable, state.opt_state, moved
    memory = step.lower(*given, fixed, x, state.key).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= sum(
        leaf.nbytes for leaf in jax.tree.leaves(given) if leaf.size >= WIDTH
    )
    matrix = 4 * WIDTH**2
    # At most one dense gradient, beside activations and what is as small as the trained values.
    assert memory.temp_size_in_bytes < (0.5 if name == "paca" else 2) * matrix
    state, _ = training.step(state, x)
    assert_close(state.frozen.params, method.merge(state.frozen, state.trainable), 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_scanned_layers_that_are_not_in_place_have_one_dense_weight_at_a_time(name):
    method, x = sparse(name), jnp.ones((8, WIDTH))

    def scanned(params, x):
        return jax.lax.scan(lambda x, layer: (jnp.tanh(x @ layer["kernel"]), None), x, params["blocks"])[0]

    def temporary(depth):
        frozen, trainable = begun(method, {"blocks": {"kernel": jnp.ones((depth, WIDTH, WIDTH))}})

        def loss(trainable, frozen):
            return jnp.sum(pj.adapt(scanned)(method.apply(frozen, trainable), x))

        step = jax.jit(jax.grad(loss)).lower(trainable, frozen).compile()
        return step.memory_analysis().temp_size_in_bytes

    a_layer = 4 * WIDTH**2
    assert temporary(8) - temporary(4) < a_layer / 2


@pytest.mark.slow
def test_a_step_of_paca_needs_less_than_one_of_lora():
    closed = temporaries(make("paca", in_place=True, rank=8), closed=True)
    assert closed <= temporaries(make("paca", rank=8)) < temporaries(pj.lora(rank=8))


@pytest.mark.parametrize("name", METHODS)
def test_closing_costs_what_is_written(name):
    method = sparse(name)
    frozen, trainable = method.init(KEY, LAYERS)
    frozen, trainable = method.close(frozen, trainable)
    close = jax.jit(method.close, donate_argnums=0).lower(frozen, trainable).compile()
    memory = close.memory_analysis()
    assert memory.alias_size_in_bytes >= tree.nbytes(LAYERS)
    assert memory.temp_size_in_bytes < tree.nbytes(LAYERS) / 8


def test_in_a_chain_each_method_puts_in_its_own():
    parts = make("paca", in_place=True, targets=["up"]), make("shira", in_place=True, targets=["down"])
    method = pj.chain(*parts, pj.unfreeze(["head"]))
    frozen, trainable = method.init(KEY, PARAMS)
    trained = moved(trainable)
    closed, kept = method.close(frozen, trained)
    out = pj.adapt(model)(method.apply(closed, kept), X)
    assert method.in_place
    assert_close(out, pj.adapt(model)(method.apply(frozen, trained), X))
    assert_close(method.merge(closed, kept), method.merge(frozen, trained), 0)
    assert_close(method.open(closed, kept), (frozen, trained), 0)


@pytest.mark.parametrize("name", METHODS)
def test_a_saved_adapter_may_come_from_a_closed_base(name, tmp_path):
    method = make(name, in_place=True)
    frozen, fresh = method.init(jax.random.key(0), PARAMS)
    trained = moved(fresh)
    save_adapter(tmp_path, method, *method.close(frozen, trained), seed=0)
    found = load_adapter(tmp_path, PARAMS)
    assert_close(found.method.merge(found.frozen, found.trainable), method.merge(frozen, trained), 0)


def test_a_base_that_is_no_array_is_refused():
    method = pj.chain(pj.lora(rank=2), make("shira", in_place=True))
    with pytest.raises(PeftError, match=r"shira: 'blocks/down/kernel' is a LowRank, which cannot be changed"):
        method.init(KEY, PARAMS)


@pytest.mark.parametrize("info", pj.METHODS.values(), ids=lambda info: info.name)
def test_to_close_and_to_open_is_nothing_for_a_method_that_is_not_in_place(info):
    method = info.factory(**info.conformance.example)
    frozen, trainable = pj.Frozen({"a": jnp.ones(2)}), {}
    for one in (method, pj.chain(method)):
        assert not one.in_place
        for way in (one.close, one.open, one.begin):
            assert all(a is b for a, b in zip(way(frozen, trainable), (frozen, trainable)))
