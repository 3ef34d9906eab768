"""A method's optimizer for some of the trainable arrays: `optax.multi_transform` and its masked nodes."""

import jax
import jax.numpy as jnp
import optax
import pytest
from support import KEY, assert_close, noisy, normal

import peftjax as pj

PARAMS = {"up": {"kernel": normal(KEY, (8, 16))}, "down": {"kernel": jnp.ones((16, 8))}}
METHODS = {
    "lora_plus": pj.lora_plus(rank=2),
    "snella": pj.snella(rank=2, total_steps=9),
    "sara": pj.sara(density=0.2),
    "galore": pj.galore(rank=2),
    "galore, each step": pj.galore(rank=2, write="step"),
    "natural_galore": pj.natural_galore(rank=2),
    "switchlora": pj.switchlora(rank=2, total_steps=9),
    "lowrank_restarts": pj.lowrank_restarts(rank=2),
}


def by_weight(trainable):
    return {path: "a" if "up" in path else "b" for path in trainable}


def by_array(trainable):
    labels = by_weight(trainable)
    return {path: dict.fromkeys(slots, labels[path]) for path, slots in trainable.items()}


def changed(method, tx):
    frozen, trainable = method.init(KEY, PARAMS)
    frozen, trainable = method.open(frozen, noisy(trainable, jax.random.key(1)))
    gradients = jax.tree.map(lambda leaf: jnp.ones_like(leaf), trainable)
    return tx.update(gradients, tx.init(trainable), trainable, frozen=frozen)[0]


@pytest.mark.slow
@pytest.mark.parametrize("labels", [by_weight, by_array])
@pytest.mark.parametrize("name", METHODS)
def test_each_group_moves_as_with_its_optimizer_alone(name, labels):
    method = METHODS[name]
    groups = {"a": method.optimizer(optax.sgd(1.0)), "b": method.optimizer(optax.sgd(0.1))}
    got = changed(method, optax.multi_transform(groups, labels))
    alone = {label: changed(method, tx) for label, tx in groups.items()}
    for path, label in by_weight(got).items():
        assert_close(got[path], alone[label][path], 1e-6)


def by_name(trainable):
    return {path: {name: name for name in slots} for path, slots in trainable.items()}


def test_factors_of_a_weight_may_have_optimizers_of_their_own():
    method = METHODS["lora_plus"]
    groups = {name: method.optimizer(optax.sgd(rate)) for name, rate in (("a", 1.0), ("b", 0.1))}
    for slots in changed(method, optax.multi_transform(groups, by_name)).values():
        assert_close(slots["a"], jnp.full_like(slots["a"], -1.0), 1e-6)
        assert_close(slots["b"], jnp.full_like(slots["b"], -1.6), 1e-6)


@pytest.mark.parametrize(
    ("name", "given"), [("snella", "a"), ("galore, each step", "z"), ("switchlora", "a")]
)
def test_a_hook_that_needs_all_arrays_of_a_weight_says_which_are_missing(name, given):
    method = METHODS[name]

    def one_of_each(trainable):
        return {path: {n: n == given for n in slots} for path, slots in trainable.items()}

    tx = optax.masked(method.optimizer(optax.sgd(1.0)), one_of_each)
    with pytest.raises(pj.PeftError, match="same label"):
        changed(method, tx)


def test_in_a_chain_whole_methods_may_be_masked_out():
    method = pj.chain(pj.lora_plus(rank=2, targets=["up"]), pj.sara(density=0.2, targets=["down"]))
    tx, labels = method.optimizer(optax.sgd(1.0)), {"lora_plus": "x", "sara": "y"}
    got = changed(method, optax.multi_transform({"x": tx, "y": optax.set_to_zero()}, labels))
    alone = changed(method, tx)
    assert_close(got["lora_plus"], alone["lora_plus"], 1e-6)
    assert all(not leaf.any() for leaf in jax.tree.leaves(got["sara"]))


@pytest.mark.slow
def test_a_budget_is_that_of_a_group_where_groups_have_optimizers_of_their_own():
    """SNELLA shares out, within each group, what the schedule keeps of all weights."""
    method = pj.snella(rank=2, total_steps=9, allocate_every=3, sparsity=0.5)
    frozen, trainable = method.init(KEY, PARAMS)
    trainable = noisy(trainable, jax.random.key(1))
    gradients = noisy(jax.tree.map(jnp.zeros_like, trainable), jax.random.key(2))

    def levels(tx):
        state = tx.init(trainable)
        _, state = tx.update(gradients, state, trainable, frozen=frozen)
        after, *_ = method.advance(None, frozen, trainable, state, step=6, key=KEY, tx=tx)
        return {path: float(slots["sparsity"]) for path, slots in after.state.items()}

    groups = {name: method.optimizer(optax.sgd(0.1)) for name in "ab"}
    apart, together = levels(optax.multi_transform(groups, by_weight)), levels(groups["a"])
    assert list(apart.values()) == pytest.approx([0.5, 0.5], abs=1e-6)
    assert sum(together.values()) == pytest.approx(1.0, abs=1e-6)  # both weights are of one size
    assert abs(together["up/kernel"] - 0.5) > 1e-2
