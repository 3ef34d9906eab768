"""What every transformation of `pj.optim` does as those of optax do, on matrices, vectors and scalars."""

import functools
import inspect

import jax
import jax.numpy as jnp
import optax
import pytest
from support import KEY, all_but_slow, assert_close, normal, quick_at

import peftjax as pj
from peftjax.core.errors import PeftError

optim = pj.optim
START = {
    "blocks": {"kernel": normal(KEY, (2, 4, 6))},
    "up": {"kernel": normal(KEY, (6, 4)), "bias": jnp.arange(4.0)},
    "scale": jnp.float32(2.0),
}
FLAT = {"w": jnp.arange(1.0, 4.0), "b": jnp.float32(2.0)}
MOVED = jax.tree.map(lambda leaf: 0.5 * leaf - 1.0, START)  # the gradient has full rank
STEP = {"rank": 4, "every": 5, "scale": 1.0}

# name: factory of a transformation that descends at a learning rate, and its static arguments.
DESCENTS = {
    "adamp": (optim.adamp, ()),
    "adamw": (optim.adamw, ()),
    "fira": (functools.partial(optim.fira, **STEP), ("rank", "scale")),
    "galore": (functools.partial(optim.galore, **STEP), ("rank",)),
    "natural_galore": (functools.partial(optim.natural_galore, **STEP, history=3), ("rank", "history")),
    "row_adamw": (functools.partial(optim.row_adamw, weight_decay=0.0), ()),
    "sgdp": (functools.partial(optim.sgdp, momentum=0.5), ()),
}


def after(piece):
    """A factory that descends along what a piece makes of the gradients."""

    def descend(learning_rate):
        return optax.chain(piece, optax.scale_by_learning_rate(learning_rate))

    return descend, ()


PIECES = {
    "decay_updated_weights": optim.decay_updated_weights(0.1, 0.1),
    "eight_bit": optim.eight_bit(optax.scale_by_adam(), min_size=16),
    "project": optim.project(optax.scale_by_adam(), **STEP),
    "remove_radial": optim.remove_radial(optax.scale_by_adam()),
    "scale_by_natural_gradient": optim.scale_by_natural_gradient(3, 1.0),
    "scale_by_released_adam": optim.scale_by_released_adam(),
    "scale_by_row_adam": optim.scale_by_row_adam(),
}
ALL = DESCENTS | {name: after(piece) for name, piece in PIECES.items()}
ALL["normalize_and_project"] = (lambda rate: optim.normalize_and_project(optax.adam(rate)), ())
QUICK = ("adamp", "galore", "eight_bit", "scale_by_row_adam", "normalize_and_project")
EACH = pytest.mark.parametrize("name", all_but_slow(ALL, QUICK))


def made(name):
    return ALL[name][0](0.1)


@functools.cache
def run(name, kind="plain", steps=2):
    """Parameters and states of steps down the distance from `MOVED`, in one program."""
    params = START
    if kind == "bfloat16":
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), START)
    if kind == "flat":
        params = FLAT
    tx = made(name)
    if kind == "injected":
        factory, static = ALL[name]
        tx = optax.inject_hyperparams(factory, static_args=static)(optax.constant_schedule(0.1))
    if kind == "accumulated":
        tx = optax.MultiSteps(tx, 2)

    def step(carry, _):
        params, state = carry
        goal = 0.0 if kind == "flat" else jax.tree.map(lambda leaf, to: leaf - to, params, MOVED)
        grads = jax.tree.map(lambda leaf, to: to.astype(leaf.dtype), params, goal) if goal else params
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    state = tx.init(params)
    ran, _ = jax.jit(lambda carry: jax.lax.scan(step, carry, length=steps))((params, state))
    return params, state, *ran


def distance(params):
    return sum(float(jnp.sum((a - b) ** 2)) for a, b in zip(*map(jax.tree.leaves, (params, MOVED))))


def test_every_public_transformation_is_here():
    returns = {n: inspect.signature(f).return_annotation for n, f in vars(optim).items() if callable(f)}
    known = {n for n, kind in returns.items() if n in optim.__all__ and "GradientTransformation" in str(kind)}
    assert known == set(ALL)


@pytest.mark.parametrize("name", all_but_slow([n for n in ALL if n != "decay_updated_weights"], QUICK))
def test_it_descends(name):
    _, _, params, _ = run(name, steps=30)
    # On its first sphere a matrix cannot reach the goal, and a natural gradient shrinks what repeats.
    slow = "natural" in name or name == "normalize_and_project"
    assert distance(params) < (0.95 if slow else 0.5) * distance(START)


@EACH
def test_states_keep_shapes_and_dtypes_in_bfloat16_too(name):
    # A scan refuses a carry that changes.
    params, state, ended, last = run(name, "bfloat16")
    described = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    assert described(ended) == described(params)
    assert described(last) == described(state)
    assert jax.tree.all(jax.tree.map(lambda leaf: bool(jnp.isfinite(leaf).all()), ended))


@EACH
def test_map_params_reaches_what_mirrors_the_parameters_and_nothing_else(name):
    tx = made(name)
    state = tx.init(START)
    same = optax.tree_utils.tree_map_params(tx, lambda leaf: leaf, state)
    assert jax.tree.structure(same) == jax.tree.structure(state)
    mapped, other = [], []
    optax.tree_utils.tree_map_params(tx, mapped.append, state, transform_non_params=other.append)
    count = lambda leaves: len(jax.tree.leaves(leaves))
    assert count(mapped) + count(other) == count(state)
    assert bool(mapped) == (name != "decay_updated_weights")


@pytest.mark.parametrize("name", quick_at(DESCENTS, every=3))
def test_an_injected_schedule_is_the_plain_one(name):
    assert_close(run(name, "injected")[2], run(name)[2], 1e-4)


@EACH
def test_vectors_and_scalars_alone_are_left_to_the_inner_transformation(name):
    began, _, ended, _ = run(name, "flat")
    assert jax.tree.all(
        jax.tree.map(lambda a, b: bool(jnp.isfinite(b).all() and (a != b).any()), began, ended)
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["galore", "normalize_and_project", "sgdp"])
def test_masked_and_accumulated(name):
    tx = optax.masked(made(name), {"blocks": True, "up": True, "scale": False})
    updates, _ = tx.update(START, tx.init(START), START)
    assert float(updates["scale"]) == 2.0
    # Two equal windows of one gradient: the mean is the gradient, and the second window another step.
    assert_close(run(name, "accumulated")[2], run(name, steps=1)[2], 1e-5)


def test_strict_refuses_parameters_without_a_matrix():
    inner = optax.scale_by_adam()
    for tx in (
        optim.project(inner, rank=2, strict=True),
        optim.galore(0.1, rank=2, strict=True),
        optim.natural_galore(0.1, rank=2, strict=True),
        optim.normalize_and_project(inner, strict=True),
    ):
        with pytest.raises(PeftError, match="no parameter this method can adapt"):
            tx.init(FLAT)


def test_what_shapes_depend_on_must_be_static_and_damping_need_not():
    for static, missing in ((("rank",), "history"), (("history",), "rank")):
        tx = optax.inject_hyperparams(optim.natural_galore, static_args=static)(0.1, rank=2, history=3)
        with pytest.raises(PeftError, match=f"{missing} decides shapes .* static_args"):
            tx.init(START)
    halved = optax.inject_hyperparams(optim.natural_galore, static_args=("rank", "history"))
    tx = halved(0.1, rank=2, history=3, damping=optax.constant_schedule(1e-2))
    state = tx.init(START)
    made, _ = jax.jit(tx.update)(START, state, START)
    plain = optim.natural_galore(0.1, rank=2, history=3, damping=1e-2)
    assert_close(made, jax.jit(plain.update)(START, plain.init(START), START)[0], 1e-5)
