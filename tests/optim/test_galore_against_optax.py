"""GaLore beside `optax.contrib.galore`: the same where the definitions agree, each difference measured."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimizing
import pytest
from support import KEY, assert_close

from peftjax.core import tree
from peftjax.optim._galore import galore

SHAPES = {"up": (6, 10), "down": (10, 6), "square": (6, 6), "bias": (6,)}
ALL = r"up|down|square|stack"


def tree_of(step, shapes=SHAPES, dtype=jnp.float32):
    keys = jax.random.split(jax.random.fold_in(KEY, step), len(shapes))
    return {name: jax.random.normal(k, shape, dtype) for (name, shape), k in zip(shapes.items(), keys)}


PARAMS, GRADS = tree_of(99), [tree_of(step) for step in range(8)]
SAME = {"targets": ALL, "side": "larger", "basis": "svd", "signs": "decomposition", "order": "optax"}


def train(tx, params=PARAMS, grads=GRADS):
    return optimizing.train(tx, params, grads)[:2]


def beside(ours, **theirs):
    """Parameters after eight steps and two refreshes, ours and optax's."""
    common = {"learning_rate": 0.05, "rank": 3, "weight_decay": theirs.pop("weight_decay", 0.1)}
    mine = train(galore(**common, every=3, scale=0.25, **ours))[0]
    return mine, train(optax.contrib.galore(**common, update_proj_gap=3, scale=0.25, **theirs))[0]


def gap(left, right, name):
    return float(jnp.abs(left[name] - right[name]).max())


def test_with_its_side_its_order_and_svd_the_trajectory_is_the_same():
    """Squares too: its rule `in >= out` and ours, the input side of equals, are one."""
    assert_close(*beside(SAME), tolerance=1e-5)


def test_it_compresses_the_larger_side_so_that_more_is_projector_and_less_are_moments():
    """For 6 x 10 and r = 3: projector 3·10 and moments 2·3·6; as released 3·6 and 2·3·10."""
    mine, theirs = beside({**SAME, "side": "smaller"})
    assert gap(mine, theirs, "up") > 0.01
    assert gap(mine, theirs, "square") < 1e-5
    state = optax.contrib.galore(0.1, rank=3).init(PARAMS)[0]
    ours = galore(0.1, rank=3, targets=ALL).init(PARAMS)[0]
    assert (state.projector["up"].size, state.base_optimizer_state.mu["up"].size) == (30, 18)
    assert (ours.bases["up"]["input"].size, ours.inner.mu["up"].size) == (18, 30)


def test_its_eps_is_inside_the_bias_correction():
    """Of gradients near 1e-5 at eps 1e-6, its first steps are near full size, the released ones are not."""
    small = [jax.tree.map(lambda g: 1e-5 * g, GRADS[0])]
    steps = {}
    for name, tx in (
        ("optax", optax.contrib.galore(1.0, rank=3, base_optimizer=optax.scale_by_adam(eps=1e-6))),
        ("ours", galore(1.0, rank=3, scale=1.0, eps=1e-6, **{**SAME, "order": "released"})),
    ):
        moved = train(tx, grads=small)[0]["bias"] - PARAMS["bias"]
        steps[name] = float(jnp.abs(moved).max())
    assert steps["optax"] > 0.8
    assert 0.1 < steps["ours"] < 0.5


def test_it_decays_the_weights_before_the_step():
    """The released order decays those after it: lr² wd apart at each step, no more."""
    eps = {"eps": 1e-12}
    adam = {"base_optimizer": optax.scale_by_adam(eps=1e-12)}
    mine, theirs = beside({**SAME, **eps, "order": "released"}, **adam)
    assert 1e-4 < gap(mine, theirs, "bias") < 8 * 0.05**2 * 0.1 * 1.5
    assert_close(*beside({**SAME, **eps, "order": "released"}, **adam, weight_decay=0.0), tolerance=1e-5)


def test_it_does_not_project_stacked_kernels():
    """Layers `[L, in, out]` keep whole moments there: `weight_dimension_numbers` merges axes only."""
    params = {"stack": jnp.ones((4, 6, 10))}
    theirs = optax.contrib.galore(0.1, rank=3).init(params)[0]
    mine = galore(0.1, rank=3, targets=ALL).init(params)[0]
    assert theirs.base_optimizer_state.mu["stack"].shape == (4, 6, 10)
    assert mine.inner.mu["stack"].shape == (4, 3, 10)
    batched = optax.contrib.GaLoreDimensionNumbers(1, 2)
    with pytest.raises(ValueError, match="All axes must be specified"):
        optax.contrib.galore(0.1, rank=3, weight_dimension_numbers=batched).init(params)


def test_it_projects_every_matrix_and_ours_what_is_targeted():
    """Embeddings and heads included there; the released code projects linear layers of the blocks only."""
    params = {"embedding": jnp.ones((12, 6)), "fc": jnp.ones((6, 10)), "head": {"kernel": jnp.ones((6, 4))}}
    theirs = optax.contrib.galore(0.1, rank=3).init(params)[0]
    assert all(leaf.size for leaf in jax.tree.leaves(theirs.projector))
    assert list(galore(0.1, rank=3).init(params)[0].bases) == ["fc"]


def test_its_svd_is_in_the_program_of_every_step():
    """Under `lax.cond`: skipped at run time, but its buffers are planned for; `refresh=False` has none."""
    theirs, mine = optax.contrib.galore(0.1, rank=3), galore(0.1, rank=3, **SAME)
    text = str(jax.make_jaxpr(theirs.update)(PARAMS, theirs.init(PARAMS), PARAMS))
    other = jax.make_jaxpr(lambda g, s: mine.update(g, s, g, refresh=False))(PARAMS, mine.init(PARAMS))
    assert "svd" in text
    assert "svd" not in str(other)


def test_its_projector_is_rounded_to_the_dtype_of_the_gradient():
    """bfloat16: 2e-3 from orthonormal for 64 x 48 there; float32 here."""
    shapes = {"up": (48, 64)}
    params, grads = tree_of(0, shapes, jnp.bfloat16), [tree_of(1, shapes, jnp.bfloat16)]

    def error(rows):
        rows = np.asarray(rows, np.float64)
        return np.linalg.norm(rows @ rows.T - np.eye(len(rows))) / len(rows) ** 0.5

    theirs = train(optax.contrib.galore(0.1, rank=8), params, grads)[1][0].projector["up"]
    mine = train(galore(0.1, rank=8, **SAME), params, grads)[1][0].bases["up"]["output"]
    assert error(theirs.astype(jnp.float32).T) > 3e-4
    assert error(mine) < 1e-6


def test_unit_ranks_and_ranks_above_the_matrix_are_cut_alike():
    for rank in (1, 99):
        mine = galore(0.05, rank=rank, scale=1.0, **SAME)
        assert_close(train(mine)[0], train(optax.contrib.galore(0.05, rank=rank))[0], 1e-5)
        assert {min(leaf.shape) for leaf in tree.named_leaves(mine.init(PARAMS)[0].bases).values()} <= {
            rank,
            6,
        }
