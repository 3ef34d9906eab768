"""The projection around any optax transformation: what it sees, what comes back, when it refreshes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimizing
import pytest
from support import KEY, all_but_slow, assert_close, combined

from peftjax.core import tree
from peftjax.core.errors import PeftError
from peftjax.optim.bases import gram_basis, pointed, svd_basis
from peftjax.optim.projection import project

SHAPES = {
    "blocks": {
        "up": {"kernel": (2, 6, 10), "bias": (2, 10)},
        "down": {"kernel": (2, 10, 6)},
        "experts": {"kernel": (2, 3, 8, 5)},
    },
    "head": {"kernel": (6, 4)},
}
PROJECTED = ["blocks/up/kernel", "blocks/down/kernel", "blocks/experts/kernel"]


def random_tree(step, dtype=jnp.float32):
    leaves, structure = jax.tree.flatten(SHAPES, is_leaf=lambda node: isinstance(node, tuple))
    random = np.random.default_rng(step)
    return structure.unflatten([jnp.array(random.standard_normal(shape), dtype) for shape in leaves])


PARAMS = random_tree(1000)
GRADS = [random_tree(step) for step in range(8)]
SMALL, *SMALL_GRADS = [{"up": t["blocks"]["up"], "head": t["head"]} for t in (PARAMS, *GRADS)]


def train(tx, steps=5, params=PARAMS, grads=GRADS):
    return optimizing.train(tx, params, grads[:steps])


def gap(left, right):
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right))
    return max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs)


# What the inner transformation does at full rank.


@pytest.mark.parametrize(("momentum", "side"), combined([0.9, None], ["smaller", "larger"]))
def test_at_full_rank_what_is_linear_is_unprojected(momentum, side):
    """Momentum commutes with a fixed basis; one of the larger side holds the first gradient only."""
    inner = optax.sgd(0.01, momentum=momentum)
    grads = GRADS if side == "smaller" else [GRADS[0]] * 5
    params, *_ = train(project(inner, rank=99, every=100, scale=1.0, side=side), grads=grads)
    assert gap(params, train(inner, grads=grads)[0]) < 2e-6


def test_the_signs_of_a_basis_are_a_rule_or_those_of_the_decomposition():
    found = {}
    for signs in ("largest", "decomposition"):
        tx = project(optax.sgd(0.1), rank=2, basis="svd", signs=signs)
        _, state = tx.update(GRADS[0], tx.init(PARAMS))
        found[signs] = state.bases["blocks/experts/kernel"]["output"]
    np.testing.assert_array_equal(
        found["decomposition"], svd_basis(GRADS[0]["blocks"]["experts"]["kernel"], 2, "output")
    )
    largest = found["largest"]
    np.testing.assert_array_equal(jnp.abs(largest), jnp.abs(found["decomposition"]))
    assert (jnp.max(largest, axis=-1) == jnp.max(jnp.abs(largest), axis=-1)).all()
    assert not np.array_equal(largest, found["decomposition"])


def test_adam_at_full_rank_is_another_optimizer_and_with_the_identity_the_same():
    """5.3e-2 apart after five steps of 0.01; with P = I in the state from the start, bit by bit the same."""
    tx = project(optax.adam(0.01), rank=99, every=100, scale=1.0)
    plain = train(optax.adam(0.01))[0]
    assert gap(train(tx)[0], plain) > 2e-2
    state = tx.init(PARAMS)
    eyes = jax.tree.map(lambda b: jnp.broadcast_to(jnp.eye(b.shape[-1]), b.shape), state.bases)
    started = state._replace(bases=eyes, count=jnp.ones([], jnp.int32))
    params, *_ = optimizing.train(tx, PARAMS, GRADS[:5], started)
    jax.tree.map(np.testing.assert_array_equal, params, plain)


@pytest.mark.slow
def test_signs_of_the_basis_do_not_matter_to_adam_and_rotations_do():
    tx = project(optax.scale_by_adam(), rank=3)
    _, state = tx.update(GRADS[0], tx.init(PARAMS), refresh=True)
    fresh = state._replace(inner=tx.init(PARAMS).inner)

    def made(change):
        return tx.update(GRADS[1], fresh._replace(bases=jax.tree.map(change, fresh.bases)), refresh=False)[0]

    signs = jnp.asarray([1.0, -1.0, -1.0])[:, None]
    turn = jnp.linalg.qr(jax.random.normal(KEY, (3, 3)))[0]
    jax.tree.map(np.testing.assert_array_equal, made(lambda b: b), made(lambda b: signs * b))
    assert gap(made(lambda b: b), made(lambda b: turn @ b)) > 0.05


# Shapes.


def shapes_of(side, rank=3):
    state = project(optax.trace(0.9), rank=rank, side=side).init(PARAMS)
    bases = {path: {s: b.shape for s, b in found.items()} for path, found in state.bases.items()}
    return bases, {path: leaf.shape for path, leaf in tree.named_leaves(state.inner.trace).items()}


@pytest.mark.parametrize(
    ("side", "bases", "moments"),
    [
        ("smaller", {"input": (2, 3, 6)}, (2, 3, 10)),
        ("larger", {"output": (2, 3, 10)}, (2, 3, 6)),
        ("input", {"input": (2, 3, 6)}, (2, 3, 10)),
        ("output", {"output": (2, 3, 10)}, (2, 3, 6)),
        ("both", {"input": (2, 3, 6), "output": (2, 3, 10)}, (2, 3, 3)),
    ],
)
def test_shapes_of_a_matrix_of_6_x_10(side, bases, moments):
    found, shapes = shapes_of(side)
    assert found["blocks/up/kernel"] == bases
    assert shapes["blocks/up/kernel"] == moments


@pytest.mark.parametrize("side", ["smaller", "larger"])
def test_of_a_square_matrix_the_input_side_is_compressed(side):
    state = project(optax.identity(), rank=3, side=side).init({"w": jnp.zeros((2, 6, 6))})
    assert list(state.bases["w"]) == ["input"]


def test_the_rank_is_cut_to_each_matrix_and_everything_else_is_whole():
    bases, shapes = shapes_of("smaller", rank=99)
    assert set(bases) == set(PROJECTED)
    assert bases["blocks/experts/kernel"] == {"output": (2, 3, 5, 5)}
    assert shapes["blocks/up/bias"] == (2, 10)
    assert shapes["head/kernel"] == (6, 4)


def test_the_bytes_of_the_state():
    """r · min of the basis and r · max of each moment."""
    state = project(optax.scale_by_adam(), rank=3, targets=["up", "down"]).init(PARAMS)
    whole = sum(leaf.size for path, leaf in tree.named_leaves(PARAMS).items() if path not in PROJECTED[:2])
    matrices = 2 * 2 * (3 * 6 + 2 * 3 * 10)
    assert tree.nbytes(state) == 4 * (matrices + 2 * whole + 2)


# The update.


@pytest.mark.parametrize(
    ("side", "basis"), combined(["smaller", "larger", "both"], ["auto", "svd", "gram", "subspace"])
)
def test_on_a_refresh_the_way_there_and_back_is_the_best_approximation(side, basis):
    tx = project(optax.identity(), rank=3, side=side, basis=basis, scale=2.0)
    updates, _ = jax.jit(tx.update)(GRADS[0], tx.init(PARAMS))
    for path in PROJECTED:
        g = np.asarray(tree.named_leaves(GRADS[0])[path], np.float64)
        s = np.linalg.svd(g, compute_uv=False)
        best = np.sum(s[..., 3:] ** 2, -1)
        error = np.sum((g - 0.5 * np.asarray(tree.named_leaves(updates)[path])) ** 2, (-1, -2))
        np.testing.assert_allclose(error, best, rtol=2e-4)
    np.testing.assert_array_equal(updates["head"]["kernel"], GRADS[0]["head"]["kernel"])


def test_what_is_not_projected_is_left_to_the_inner_transformation():
    made = train(project(optax.adam(0.1), rank=2, every=2))[2]
    for mine, plain in zip(made, train(optax.adam(0.1))[2]):
        np.testing.assert_allclose(mine["head"]["kernel"], plain["head"]["kernel"], rtol=1e-5)
        np.testing.assert_allclose(mine["blocks"]["up"]["bias"], plain["blocks"]["up"]["bias"], rtol=1e-5)


def test_the_rank_of_what_was_trained_grows_by_r_a_refresh():
    for every, wanted in ((100, 2), (2, 4), (1, 6)):
        params, *_ = train(project(optax.adam(0.1), rank=2, every=every), steps=3 if every == 1 else 4)
        moved = params["blocks"]["up"]["kernel"] - PARAMS["blocks"]["up"]["kernel"]
        assert (np.linalg.matrix_rank(moved, rtol=1e-4) == wanted).all()


@pytest.mark.parametrize("n_out", [10, pytest.param(6, marks=pytest.mark.slow)])
def test_a_transposed_kernel_has_the_transposed_update(n_out):
    only = {"w": PARAMS["blocks"]["up"]["kernel"][..., :n_out]}
    turned = {"w": jnp.swapaxes(only["w"], 1, 2)}
    grads = [{"w": g["blocks"]["up"]["kernel"][..., :n_out]} for g in GRADS]
    over = [{"w": jnp.swapaxes(g["w"], 1, 2)} for g in grads]

    def options(letters):
        return {"rank": 3, "every": 2, "layouts": {"w": letters}, "targets": ["w"], "moments": "rotate"}

    left = train(project(optax.adam(0.1), **options("sio")), 4, only, grads=grads)[0]
    right = train(project(optax.adam(0.1), **options("soi")), 4, turned, grads=over)[0]
    np.testing.assert_allclose(left["w"], jnp.swapaxes(right["w"], 1, 2), atol=1e-5)


def test_heads_are_outputs_of_one_matrix():
    params = {"query": {"kernel": jax.random.normal(KEY, (6, 2, 4))}}
    tx = project(optax.identity(), rank=2, scale=1.0)
    updates, state = tx.update(params, tx.init(params))
    assert state.bases["query/kernel"]["input"].shape == (2, 6)
    assert np.linalg.matrix_rank(updates["query"]["kernel"].reshape(6, 8)) == 2


@pytest.mark.parametrize("name", [pytest.param("up", marks=pytest.mark.slow), "experts"])
def test_every_matrix_of_a_stack_is_on_its_own(name):
    whole = train(project(optax.adam(0.1), rank=2, every=2))[0]["blocks"][name]["kernel"]
    at = (1, 2)[: whole.ndim - 2]
    single = {"w": PARAMS["blocks"][name]["kernel"][at]}
    grads = [{"w": g["blocks"][name]["kernel"][at]} for g in GRADS]
    alone = train(project(optax.adam(0.1), rank=2, every=2, targets=["w"]), params=single, grads=grads)[0]
    np.testing.assert_allclose(whole[at], alone["w"], atol=1e-5)


def test_zero_gradients_move_nothing():
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    params, *_ = train(project(optax.adam(0.1), rank=2, every=2, moments="rotate"), 3, grads=[zeros] * 3)
    jax.tree.map(np.testing.assert_array_equal, params, PARAMS)


# When it refreshes.


def test_it_refreshes_at_the_first_step_and_every_so_many_after():
    tx, seen = project(optax.identity(), rank=2, every=3), []
    state = tx.init(PARAMS)
    update = jax.jit(tx.update)
    for grads in GRADS[:7]:
        _, state = update(grads, state)
        seen.append(np.asarray(state.bases["blocks/up/kernel"]["input"]))
    changed = [True, *[not np.array_equal(a, b) for a, b in itertools.pairwise(seen)]]
    assert changed == [True, False, False, True, False, False, True]
    basis = pointed(gram_basis(GRADS[3]["blocks"]["up"]["kernel"], 2, "input"))
    np.testing.assert_allclose(seen[3], basis, atol=1e-5)


@pytest.mark.parametrize("moments", all_but_slow(["keep", "reset", "rotate"], ["rotate"]))
def test_two_programs_make_the_same_steps_as_one(moments):
    tx = project(optax.adam(0.1), rank=2, every=2, moments=moments, basis="subspace")
    step = jax.jit(tx.update, static_argnames="refresh")
    state, params = tx.init(SMALL), SMALL
    for n, grads in enumerate(SMALL_GRADS[:5]):
        updates, state = step(grads, state, params, refresh=n % 2 == 0)
        params = optax.apply_updates(params, updates)
    assert_close((params, state), train(tx, params=SMALL, grads=SMALL_GRADS)[:2], 1e-5)


def test_a_program_without_refresh_decomposes_nothing():
    tx = project(optax.adam(0.1), rank=2, basis="svd")
    texts = {
        refresh: str(
            jax.make_jaxpr(lambda g, s, r=refresh: tx.update(g, s, refresh=r))(PARAMS, tx.init(PARAMS))
        )
        for refresh in (True, False, None)
    }
    assert {refresh: ("svd" in t, " cond[" in t) for refresh, t in texts.items()} == {
        True: (True, False),
        False: (False, False),
        None: (True, True),
    }


# Dtypes, devices, checkpoints.


@pytest.mark.slow
def test_bfloat16_parameters_have_float32_bases_and_moments_and_keep_their_dtype():
    params, grads = random_tree(0, jnp.bfloat16), [random_tree(1, jnp.bfloat16)]
    params, state, made = train(project(optax.adam(0.1), rank=2), 1, params, grads=grads)
    kernel = state.inner[0].mu["blocks"]["up"]["kernel"], state.bases["blocks/up/kernel"]["input"]
    assert {leaf.dtype for leaf in kernel} == {jnp.dtype(jnp.float32)}
    assert {leaf.dtype for leaf in jax.tree.leaves((params, made))} == {jnp.dtype(jnp.bfloat16)}


def test_bases_and_moments_of_a_given_dtype():
    tx = project(optax.adam(0.1), rank=2, every=2, dtype=jnp.bfloat16, moments="rotate")
    _, state, _ = train(tx)
    kernel = state.inner[0].mu["blocks"]["up"]["kernel"], state.bases["blocks/up/kernel"]["input"]
    assert {leaf.dtype for leaf in kernel} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.slow
@pytest.mark.parametrize("basis", ["svd", "gram", "subspace"])
def test_sharded_parameters(basis):
    tx = project(optax.adam(0.01), rank=2, every=2, basis=basis, moments="rotate")
    optimizing.assert_same_when_sharded(tx, SMALL, SMALL_GRADS[:4])


@pytest.mark.slow
def test_a_run_goes_on_bit_by_bit_from_its_checkpoint(tmp_path):
    tx = project(optax.adam(0.1), rank=2, every=2, basis="subspace", moments="rotate")
    optimizing.assert_resumes(tx, SMALL, SMALL_GRADS[:6], tmp_path)


# Errors.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be positive, got 0"),
        ({"every": 0}, "every must be positive, got 0"),
        ({"side": "left"}, "side must be one of smaller, larger, input, output, both, got 'left'"),
        ({"basis": "qr"}, "basis must be one of auto, svd, gram, subspace, got 'qr'"),
        ({"signs": "first"}, "signs must be one of largest, decomposition, got 'first'"),
        ({"moments": "drop"}, "moments must be one of keep, reset, rotate, got 'drop'"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(PeftError, match=message):
        project(optax.adam(0.1), **{"rank": 2, **options})


def test_targets_that_match_nothing_and_a_traced_refresh():
    with pytest.raises(PeftError, match="target 'upp' matched no parameter"):
        project(optax.adam(0.1), rank=2, targets=["upp"]).init(PARAMS)
    with pytest.raises(PeftError, match="pattern 'query' matched no target"):
        project(optax.adam(0.1), rank=2, layouts={"query": "io"}).init(PARAMS)
    tx = project(optax.adam(0.1), rank=2)
    with pytest.raises(PeftError, match="static_argnames"):
        jax.jit(lambda refresh: tx.update(GRADS[0], tx.init(PARAMS), refresh=refresh))(True)
