"""What becomes of moments when the basis changes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optimizing import train
from support import KEY

from peftjax.core import tree
from peftjax.core.errors import PeftError
from peftjax.optim.projection import project


def tree_of(step):
    keys = jax.random.split(jax.random.fold_in(KEY, step), 2)
    return {
        "up": {"kernel": jax.random.normal(keys[0], (2, 6, 10))},
        "head": {"kernel": jax.random.normal(keys[1], (6, 4))},
    }


PARAMS, GRADS = tree_of(99), [tree_of(step) for step in range(5)]
PROJECTED = ["up/kernel"]


def moments_around_a_refresh(moments, inner=None, side="smaller"):
    """States before and after a refresh between two steps, all moments at random positive values."""
    tx = project(inner or optax.scale_by_adam(b1=1.0, b2=1.0), rank=3, moments=moments, side=side)
    update = jax.jit(lambda grads, state: tx.update(grads, state, refresh=True)[1])
    state = update(GRADS[0], tx.init(PARAMS))
    filled = jax.tree.map(lambda leaf: jnp.abs(leaf) + 1, random_like(state.inner))
    state = state._replace(inner=filled)
    return state, update(GRADS[1], state)


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


def gap(left, right):
    return max(float(jnp.abs(a - b).max()) for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right)))


def test_rotation_keeps_momentum_where_the_new_subspace_holds_the_old():
    """At full rank the momentum in weight space does not feel a refresh; kept as it is, it does."""
    plain = train(optax.sgd(0.1, momentum=0.9), PARAMS, GRADS)[0]
    inner = {"inner": optax.sgd(0.1, momentum=0.9), "rank": 99, "every": 2, "scale": 1.0}
    assert gap(train(project(**inner, moments="rotate"), PARAMS, GRADS)[0], plain) < 5e-6
    assert gap(train(project(**inner, moments="keep"), PARAMS, GRADS)[0], plain) > 0.1


def test_states_that_cannot_rotate_are_named_and_can_be_reset():
    factored = optax.scale_by_factored_rms(min_dim_size_to_factor=2)
    with pytest.raises(PeftError, match=r"'v_row' of 'up/kernel'.*set moments to 'keep' or 'reset'"):
        project(factored, rank=3, moments="rotate").init(PARAMS)
    _, after = moments_around_a_refresh("reset", factored)
    assert np.isfinite(after.inner.v_row["up"]["kernel"]).all()


def test_parameters_in_a_list_inside_a_chain_are_not_taken_for_its_parts():
    params = [jnp.ones((4, 4)), jnp.ones((4, 4))]
    inner = optax.chain(optax.trace(0.9), optax.scale_by_adam())
    tx = project(inner, rank=2, targets="1", moments="reset")
    update = jax.jit(lambda state: tx.update(params, state, refresh=True)[1])
    first, second = update(update(tx.init(params))).inner
    np.testing.assert_allclose(first.trace[0], 1.9)
    np.testing.assert_allclose(jnp.linalg.norm(first.trace[1]), 4.0, rtol=1e-5)
    assert second.count == 2


def test_a_lone_array_has_no_tree_to_find_moments_by():
    with pytest.raises(PeftError, match="needs the parameters in a tree"):
        project(optax.trace(0.9), rank=2, moments="reset").init(jnp.ones((4, 4)))
