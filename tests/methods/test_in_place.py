"""The in-place form: the base holds the adapted weights, and is written after each step."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import KEY, assert_close
from tiny_models import moved

import peftjax as pj
from peftjax.adapters.files import load_adapter, save_adapter
from peftjax.core import tree
from peftjax.core.errors import PeftError

D, F, L = 8, 12, 3
UP, DOWN = (
    0.3 * jax.random.normal(jax.random.key(n), shape) for n, shape in ((0, (L, D, F)), (1, (L, F, D)))
)
PARAMS = {"blocks": {"up": {"kernel": UP}, "down": {"kernel": DOWN}}, "head": {"kernel": jnp.ones((D, 4))}}
X = jax.random.normal(KEY, (6, D))
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


def train(method, steps=4, params=PARAMS):
    frozen, trainable = method.init(KEY, params)
    tx = method.optimizer(optax.adamw(0.02, weight_decay=0.1))
    state = tx.init(trainable)
    write = jax.jit(method.write, donate_argnums=0)
    frozen = write(jax.tree.map(jnp.copy, frozen), trainable)

    @jax.jit
    def step(trainable, state, frozen):
        def loss(trainable):
            return jnp.mean(jnp.sin(pj.adapt(model)(method.apply(frozen, trainable), X).astype(jnp.float32)))

        updates, state = tx.update(jax.grad(loss)(trainable), state, trainable)
        return optax.apply_updates(trainable, updates), state

    for _ in range(steps):
        trainable, state = step(trainable, state, frozen)
        frozen = write(frozen, trainable)
    return frozen, trainable


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


@pytest.mark.parametrize("name", METHODS)
def test_without_write_and_after_an_old_one_nothing_is_wrong(name):
    """`apply` on what `init` gave, and `merge` from any frozen, are those of the form not in place."""
    method = make(name, in_place=True)
    frozen, fresh = method.init(KEY, PARAMS)
    trained, older = moved(fresh), moved(fresh, seed=1)
    wanted = make(name).merge(make(name).init(KEY, PARAMS)[0], trained)
    assert_close(pj.adapt(model)(method.apply(frozen, trained), X), model(wanted, X))
    for start in (frozen, method.write(frozen, fresh), method.write(frozen, older)):
        assert_close(method.merge(start, trained), wanted, 0)


@pytest.mark.parametrize("name", METHODS)
def test_going_back_is_exact(name):
    method = make(name, in_place=True)
    frozen, fresh = method.init(KEY, PARAMS)
    written = method.write(frozen, moved(fresh))
    for path, leaf in tree.named_leaves(written.params).items():
        assert (path == "head/kernel") == np.array_equal(leaf, tree.named_leaves(PARAMS)[path])
    again = method.write(written, None)
    assert_close(again, frozen, 0)


WIDTH, DEPTH = 256, 4
LAYERS = {"layers": [{"kernel": jnp.ones((WIDTH, WIDTH))} for _ in range(DEPTH)]}
BATCH = jnp.ones((64, WIDTH))


def deep(params, x):
    for layer in params["layers"]:
        x = jnp.tanh(x @ layer["kernel"])
    return x


def temporaries(method, *, written=False):
    """Bytes that a gradient needs beside its arguments and its result, as compiled."""
    frozen, trainable = method.init(KEY, LAYERS)
    frozen = method.write(frozen, trainable) if written else frozen

    def loss(trainable, frozen):
        return jnp.sum(pj.adapt(deep)(method.apply(frozen, trainable), BATCH))

    step = jax.jit(jax.grad(loss)).lower(trainable, frozen).compile()
    return step.memory_analysis().temp_size_in_bytes


def sparse(name):
    """The method with about 2 % of the numbers trained."""
    return make(name, in_place=True, **({"penalty": 0.0, "density": 0.02} if name == "sara" else {}))


@pytest.mark.parametrize("name", ["shira", "sara"])
def test_a_step_on_a_written_base_makes_no_copy_of_a_weight(name):
    method = sparse(name)
    written, unwritten = (temporaries(method, written=written) for written in (True, False))
    matrix = 4 * WIDTH**2
    assert written < unwritten - matrix / 2
    assert written < 3 * matrix  # one dense gradient, and the activations


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_scanned_layers_that_are_not_in_place_have_one_dense_weight_at_a_time(name):
    method, x = sparse(name), jnp.ones((8, WIDTH))

    def scanned(params, x):
        return jax.lax.scan(lambda x, layer: (jnp.tanh(x @ layer["kernel"]), None), x, params["blocks"])[0]

    def temporary(depth):
        frozen, trainable = method.init(KEY, {"blocks": {"kernel": jnp.ones((depth, WIDTH, WIDTH))}})

        def loss(trainable, frozen):
            return jnp.sum(pj.adapt(scanned)(method.apply(frozen, trainable), x))

        step = jax.jit(jax.grad(loss)).lower(trainable, frozen).compile()
        return step.memory_analysis().temp_size_in_bytes

    a_layer = 4 * WIDTH**2
    assert temporary(8) - temporary(4) < a_layer / 2


@pytest.mark.slow
def test_a_step_of_paca_needs_less_than_one_of_lora():
    written = temporaries(make("paca", in_place=True, rank=8), written=True)
    assert written <= temporaries(make("paca", rank=8)) < temporaries(pj.lora(rank=8))


@pytest.mark.parametrize("name", METHODS)
def test_writing_costs_what_is_written(name):
    method = sparse(name)
    frozen, trainable = method.init(KEY, LAYERS)
    frozen = method.write(frozen, trainable)
    write = jax.jit(method.write, donate_argnums=0).lower(frozen, trainable).compile()
    memory = write.memory_analysis()
    assert memory.alias_size_in_bytes >= tree.nbytes(LAYERS)
    assert memory.temp_size_in_bytes < tree.nbytes(LAYERS) / 8


def test_in_a_chain_each_method_writes_its_own():
    parts = make("paca", in_place=True, targets=["up"]), make("shira", in_place=True, targets=["down"])
    method = pj.chain(*parts, pj.unfreeze(["head"]))
    frozen, trainable = method.init(KEY, PARAMS)
    trained = moved(trainable)
    written = method.write(frozen, trained)
    out = pj.adapt(model)(method.apply(written, trained), X)
    assert method.in_place
    assert_close(out, pj.adapt(model)(method.apply(frozen, trained), X))
    assert_close(method.merge(written, trained), method.merge(frozen, trained), 0)
    assert_close(method.write(written, None), frozen, 0)


@pytest.mark.parametrize("name", METHODS)
def test_a_saved_adapter_may_come_from_a_written_base(name, tmp_path):
    method = make(name, in_place=True)
    frozen, fresh = method.init(jax.random.key(0), PARAMS)
    trained = moved(fresh)
    save_adapter(tmp_path, method, method.write(frozen, trained), trained, seed=0)
    found = load_adapter(tmp_path, PARAMS)
    assert_close(found.method.merge(found.frozen, found.trainable), method.merge(frozen, trained), 0)


def test_a_base_that_is_no_array_is_refused():
    method = pj.chain(pj.lora(rank=2), make("shira", in_place=True))
    with pytest.raises(PeftError, match=r"shira: 'blocks/down/kernel' is a LowRank, which cannot be changed"):
        method.init(KEY, PARAMS)


@pytest.mark.parametrize("info", pj.METHODS.values(), ids=lambda info: info.name)
def test_write_is_the_identity_for_a_method_that_is_not_in_place(info):
    method = info.factory(**info.conformance.example)
    assert not method.in_place
    frozen = pj.Frozen({"a": jnp.ones(2)})
    assert method.write(frozen, {}) is frozen
    assert replace(pj.chain(method), name="chain").write(frozen, {}) is frozen
