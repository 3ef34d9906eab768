"""AdaLoRA's schedule, its cuts and its penalty against their equations; beside PEFT's in another test."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import KEY, normal

import peftjax as pj
from peftjax.core.errors import PeftError
from peftjax.methods.lowrank._orthogonality import penalize
from peftjax.methods.lowrank._ranks import Schedule, keep

PARAMS = {"up": {"kernel": jnp.zeros((2, 4, 6))}, "down": {"kernel": jnp.zeros((6, 4))}}
OPTIONS = {"rank": 4, "target_rank": 2, "total_steps": 9, "init_warmup": 1, "final_warmup": 2}


def test_the_schedule_is_the_papers():
    method = pj.adalora(**OPTIONS, allocate_every=2)
    plan = method.init(KEY, PARAMS)[0].plan
    schedule = Schedule(target_rank=2, total_steps=9, init_warmup=1, final_warmup=2, every=2)
    assert [step for step in range(9) if schedule.due(step)] == [2, 4, 6, 7]
    for step in range(9):
        part = min(max((step - 1) / 6, 0.0), 1.0)
        budget = int((12 - 6) * (1 - part) ** 3 + 6)
        assert int(schedule.cut(jnp.int32(step), plan)) == 12 - budget


def test_exactly_as_many_are_kept_also_of_equal_scores():
    scores = {"a": jnp.zeros((2, 3)), "b": jnp.array([0.0, 5.0])}
    gates = jax.tree.map(lambda s: jnp.ones(s.shape, bool), scores)
    gates["b"] = gates["b"].at[1].set(False)
    for cut in (0, 1, 5):
        kept = keep(scores, gates, jnp.int32(cut))
        assert sum(int(part.sum()) for part in kept.values()) == 8 - cut
        assert bool(kept["b"][1]) == (cut == 0)  # what is cut for good goes first


def test_the_penalty_is_its_own_gradient():
    own = {
        "up": {
            "a": normal(jax.random.key(1), (2, 3, 5)),
            "b": normal(jax.random.key(2), (2, 3, 4)),
            "e": normal(jax.random.key(3), (2, 3)),
        }
    }

    def penalty(own):
        found = [own["up"][name] for name in ("a", "b")]
        return 0.3 * sum(jnp.linalg.norm(f[n] @ f[n].T - jnp.eye(3)) for f in found for n in (0, 1)) / 4

    tx = penalize("adalora", 0.3)
    zero = jax.tree.map(jnp.zeros_like, own)
    got, _ = tx.update(zero, tx.init(own), own)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5), got, jax.grad(penalty)(own))
    orthonormal = {"up": {"a": jnp.eye(3)[None], "b": jnp.eye(3)[None], "e": jnp.ones((1, 3))}}
    got, _ = tx.update(jax.tree.map(jnp.zeros_like, orthonormal), tx.init(orthonormal), orthonormal)
    assert not any(leaf.any() for leaf in jax.tree.leaves(got))


def test_the_budget_is_kept_in_a_training():
    method = pj.adalora(**OPTIONS, targets=["up", "down"])
    wanted = {
        "up": {"kernel": normal(jax.random.key(5), (2, 4, 6))},
        "down": {"kernel": normal(jax.random.key(6), (6, 4))},
    }

    def loss(params, batch):
        dense = jax.tree.map(lambda w: w.dense(), params, is_leaf=lambda w: hasattr(w, "dense"))
        return sum(jnp.sum((a - b) ** 2) for a, b in zip(jax.tree.leaves(dense), jax.tree.leaves(wanted)))

    training = pj.training(method, loss, optax.adam(0.1))
    state, found = training.start(KEY, PARAMS), []
    for _ in range(9):
        state, _ = training.step(state, {"rows": jnp.ones(2)})
        found.append(sum(int(count.sum()) for count in pj.adapters.ranks(state.frozen).values()))
    # After step s, the cut before it counts.
    assert found == [12, 12] + [int(6 * (1 - (s - 1) / 6) ** 3 + 6) for s in range(2, 8)] + [6]
    applied = method.apply(state.frozen, state.trainable)
    left = sum(int((np.abs(w["kernel"].b).max(-1) > 0).sum()) for w in applied.values())
    assert left == 6
    assert {path: count.shape for path, count in pj.adapters.ranks(state.frozen).items()} == {
        "up/kernel": (2,),
        "down/kernel": (),
    }


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"target_rank": 5}, "target_rank 5 is larger than rank 4"),
        ({"final_warmup": 0}, "final_warmup must be positive"),
        ({"init_warmup": 7}, "9 steps leave none between warm-ups of 7 and 2"),
    ],
)
def test_wrong_options_are_refused(change, text):
    with pytest.raises(PeftError, match=text):
        pj.adalora(**{**OPTIONS, **change})
