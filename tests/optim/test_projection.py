"""The projection around any optax transformation: what it sees, what comes back, when it refreshes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support import KEY, assert_close

from peftjax import tree
from peftjax.errors import PeftError
from peftjax.io import checkpoint
from peftjax.optim.bases import gram_basis
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
    keys = jax.random.split(jax.random.fold_in(KEY, step), len(leaves))
    return structure.unflatten([jax.random.normal(k, shape, dtype) for k, shape in zip(keys, leaves)])


PARAMS = random_tree(1000)
GRADS = [random_tree(step) for step in range(8)]


def train(tx, steps=5, params=PARAMS, state=None, first=0, grads=GRADS):
    """Parameters and state after some steps of one compiled program, and every update."""
    state, updates = tx.init(params) if state is None else state, []

    @jax.jit
    def step(grads, state, params):
        made, state = tx.update(grads, state, params)
        return made, state, optax.apply_updates(params, made)

    for n in range(first, first + steps):
        made, state, params = step(grads[n], state, params)
        updates.append(made)
    return params, state, updates


def gap(left, right):
    return max(float(jnp.abs(a - b).max()) for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right)))


# What the inner transformation does at full rank.


@pytest.mark.parametrize("side", ["smaller", "larger"])
@pytest.mark.parametrize("inner", [optax.sgd(0.01), optax.sgd(0.01, momentum=0.9)], ids=["sgd", "momentum"])
def test_at_full_rank_what_is_linear_is_unprojected(inner, side):
    """Momentum commutes with a fixed basis; one of the larger side holds the first gradient only."""
    grads = GRADS if side == "smaller" else [GRADS[0]] * 5
    params, *_ = train(project(inner, rank=99, every=100, scale=1.0, side=side), grads=grads)
    assert gap(params, train(inner, grads=grads)[0]) < 2e-6


def test_adam_at_full_rank_is_another_optimizer_and_with_the_identity_the_same():
    tx = project(optax.adam(0.01), rank=99, every=100, scale=1.0)
    plain = train(optax.adam(0.01))[0]
    assert gap(train(tx)[0], plain) > 1e-2
    state = tx.init(PARAMS)
    eyes = jax.tree.map(lambda b: jnp.broadcast_to(jnp.eye(b.shape[-1]), b.shape), state.bases)
    state, params = state._replace(bases=eyes), PARAMS
    for grads in GRADS[:5]:
        updates, state = tx.update(grads, state, params, refresh=False)
        params = optax.apply_updates(params, updates)
    inner, other = optax.adam(0.01), PARAMS
    kept = inner.init(PARAMS)
    for grads in GRADS[:5]:
        updates, kept = inner.update(grads, kept)
        other = optax.apply_updates(other, updates)
    jax.tree.map(np.testing.assert_array_equal, params, other)


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


@pytest.mark.parametrize("side", ["smaller", "larger", "both"])
@pytest.mark.parametrize("basis", ["svd", "gram", "subspace", "auto"])
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


@pytest.mark.parametrize("n_out", [10, 6])
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


@pytest.mark.parametrize("name", ["up", "experts"])
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
    np.testing.assert_allclose(seen[3], gram_basis(GRADS[3]["blocks"]["up"]["kernel"], 2, "input"), atol=1e-5)


@pytest.mark.parametrize("moments", ["keep", "reset", "rotate"])
def test_two_programs_make_the_same_steps_as_one(moments):
    tx = project(optax.adam(0.1), rank=2, every=2, moments=moments, basis="subspace")
    step = jax.jit(tx.update, static_argnames="refresh")
    state, params = tx.init(PARAMS), PARAMS
    for n, grads in enumerate(GRADS[:5]):
        updates, state = step(grads, state, params, refresh=n % 2 == 0)
        params = optax.apply_updates(params, updates)
    assert_close((params, state), train(tx)[:2], 1e-5)


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


# Moments on a refresh.


def moments_around_a_refresh(moments, inner=None, side="smaller"):
    tx = project(inner or optax.scale_by_adam(b1=1.0, b2=1.0), rank=3, moments=moments, side=side)
    _, state = tx.update(GRADS[0], tx.init(PARAMS), refresh=True)
    filled = jax.tree.map(lambda leaf: jnp.abs(leaf) + 1, random_like(state.inner))
    state = state._replace(inner=filled)
    return state, tx.update(GRADS[1], state, refresh=True)[1]


def random_like(state):
    def one(leaf):
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        return jax.random.normal(KEY, leaf.shape) if floating else leaf

    return jax.tree.map(one, state)


def test_kept_moments_go_on():
    before, after = moments_around_a_refresh("keep")
    jax.tree.map(np.testing.assert_array_equal, after.inner.mu, before.inner.mu)


def test_reset_moments_are_zero_for_projected_matrices_only():
    before, after = moments_around_a_refresh("reset")
    for name in ("mu", "nu"):
        old, new = (tree.named_leaves(getattr(state.inner, name)) for state in (before, after))
        for path in old:
            np.testing.assert_array_equal(new[path], 0 * old[path] if path in PROJECTED else old[path])
    assert after.inner.count == before.inner.count + 1


@pytest.mark.parametrize("side", ["smaller", "larger", "both"])
def test_rotated_moments_are_the_old_ones_in_the_new_basis(side):
    before, after = moments_around_a_refresh("rotate", side=side)
    for path in PROJECTED:
        turns = [
            np.asarray(new) @ np.swapaxes(before.bases[path][s], -1, -2)
            for s, new in after.bases[path].items()
        ]
        for name, power in (("mu", 1), ("nu", 2)):
            old, new = (tree.named_leaves(getattr(state.inner, name))[path] for state in (before, after))
            wanted = turns[0] ** power @ np.asarray(old)
            if side == "both":
                wanted = wanted @ np.swapaxes(turns[1], -1, -2) ** power
            np.testing.assert_allclose(new, wanted, atol=2e-5)


def test_rotation_keeps_momentum_where_the_new_subspace_holds_the_old():
    """At full rank the momentum in weight space does not feel a refresh; kept as it is, it does."""
    plain = train(optax.sgd(0.1, momentum=0.9))[0]
    inner = {"inner": optax.sgd(0.1, momentum=0.9), "rank": 99, "every": 2, "scale": 1.0}
    assert gap(train(project(**inner, moments="rotate"))[0], plain) < 5e-6
    assert gap(train(project(**inner, moments="keep"))[0], plain) > 0.1


def test_states_that_cannot_rotate_are_named_and_can_be_reset():
    factored = optax.scale_by_factored_rms(min_dim_size_to_factor=2)
    with pytest.raises(PeftError, match=r"'v_row' of 'blocks/.*set moments to 'keep' or 'reset'"):
        project(factored, rank=3, moments="rotate").init(PARAMS)
    _, after = moments_around_a_refresh("reset", factored)
    assert np.isfinite(after.inner.v_row["blocks"]["up"]["kernel"]).all()


def test_a_short_name_is_not_taken_for_the_end_of_a_long_one():
    params = {"kernel": jnp.ones((4, 4)), "a": {"kernel": jnp.ones((4, 4))}}
    tx = project(optax.trace(0.9), rank=2, targets="kernel", moments="reset")
    state = tx.init(params)
    state = tx.update(params, state, refresh=True)[1]
    _, state = tx.update(params, state, refresh=True)
    np.testing.assert_allclose(state.inner.trace["a"]["kernel"], 1.9)
    np.testing.assert_allclose(jnp.abs(state.inner.trace["kernel"]).max(), 2.0, rtol=1e-5)


# Inside and around other transformations.

INNERS = {
    "adafactor": optax.scale_by_factored_rms(min_dim_size_to_factor=2),
    "lion": optax.scale_by_lion(),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "rmsprop": optax.rmsprop(0.1),
    "labels": optax.partition(
        {"a": optax.adam(0.1), "b": optax.sgd(0.1)},
        lambda params: tree.map_named(lambda path, _: "a" if path in PROJECTED else "b", params),
    ),
}


@pytest.mark.parametrize("moments", ["keep", "reset"])
@pytest.mark.parametrize("inner", INNERS.values(), ids=INNERS)
def test_any_inner_transformation(inner, moments):
    params, *_ = train(project(inner, rank=2, every=2, moments=moments))
    moved = tree.named_leaves(jax.tree.map(lambda a, b: jnp.abs(a - b).max(), params, PARAMS))
    assert all(0 < distance < 100 for distance in moved.values())


def test_an_inner_transformation_that_asks_for_parameters_is_refused():
    tx = project(optax.adamw(0.1), rank=2)
    with pytest.raises(PeftError, match="chain weight decay and the like after project"):
        tx.update(GRADS[0], tx.init(PARAMS), PARAMS)


def test_accumulated_gradients_are_projected_together():
    tx = project(optax.adam(0.1), rank=2, every=2)
    pairs = [jax.tree.map(lambda a, b: (a + b) / 2, *GRADS[n : n + 2]) for n in (0, 2, 4, 6)]
    params, *_ = train(optax.MultiSteps(tx, 2), steps=8)
    assert_close(params, train(tx, steps=4, grads=pairs)[0], 1e-5)


def test_masked_and_injected():
    tx = optax.masked(
        project(optax.trace(0.9), rank=2), lambda params: tree.map_named(lambda p, _: "up" in p, params)
    )
    masked = train(tx, 2)[2][0]
    np.testing.assert_array_equal(masked["blocks"]["down"]["kernel"], GRADS[0]["blocks"]["down"]["kernel"])
    assert np.linalg.matrix_rank(masked["blocks"]["up"]["kernel"][0]) == 2
    injected = optax.inject_hyperparams(project, static_args=("rank", "every"))
    tx = injected(inner=optax.trace(0.9), rank=2, every=2, scale=0.5)
    assert_close(train(tx, 3)[0], train(project(optax.trace(0.9), rank=2, every=2, scale=0.5), 3)[0])


def test_buffers_can_be_donated():
    tx = project(optax.adam(0.1), rank=2, every=2)
    params, state = jax.tree.map(jnp.copy, PARAMS), tx.init(PARAMS)
    step = jax.jit(lambda g, s, p: (*tx.update(g, s, p), p), donate_argnums=(1, 2))
    for grads in GRADS[:3]:
        updates, state, params = step(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert_close(params, train(tx, 3)[0])


# Dtypes, devices, checkpoints.


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


@pytest.mark.parametrize("basis", ["svd", "gram", "subspace"])
def test_sharded_parameters(basis):
    mesh = jax.make_mesh(
        (2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4]
    )
    tx = project(optax.adam(0.01), rank=2, every=2, basis=basis, moments="rotate")
    specs = {(2, 6, 10): P(None, "data", "tensor"), (2, 10, 6): P(None, "tensor", "data")}

    def spread(tree):
        return jax.tree.map(lambda a: jax.device_put(a, NamedSharding(mesh, specs.get(a.shape, P()))), tree)

    sharded = train(tx, 4, spread(PARAMS), grads=[spread(g) for g in GRADS])[0]
    assert_close(sharded, train(tx, 4)[0], 1e-5)


def test_a_run_goes_on_bit_by_bit_from_its_checkpoint(tmp_path):
    tx = project(optax.adam(0.1), rank=2, every=2, basis="subspace", moments="rotate")
    wanted = train(tx, 6)
    params, state, _ = train(tx, 3)
    run = checkpoint.RunState(params, state, KEY, 3, {}, {})
    with checkpoint.open_checkpoints(tmp_path, keep_last=1, keep_best=1) as checkpoints:
        checkpoint.save(checkpoints, run)
    with checkpoint.open_checkpoints(tmp_path, keep_last=1, keep_best=1) as checkpoints:
        blank = checkpoint.RunState(PARAMS, tx.init(PARAMS), KEY, 0, {}, {})
        found = checkpoint.restore_latest(checkpoints, blank)
    again = train(tx, 3, found.trainable, found.opt_state, first=3)
    jax.tree.map(np.testing.assert_array_equal, again[:2], wanted[:2])


# Errors.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank and every must be positive"),
        ({"every": 0}, "rank and every must be positive"),
        ({"side": "left"}, "side must be one of smaller, larger, input, output, both, got 'left'"),
        ({"basis": "qr"}, "basis must be one of auto, svd, gram, subspace, got 'qr'"),
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
