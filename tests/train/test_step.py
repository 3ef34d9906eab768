from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from support import KEY

import peftjax as pj
from peftjax.core.errors import PeftError
from peftjax.losses import accuracy, classification, cross_entropy
from peftjax.train.data.batches import make_batch
from peftjax.train.evaluate import make_evaluate
from peftjax.train.step import divided, model_loss


def deterministic(params, batch, *, key=None):
    return tiny.forward(params, batch)


def training_of(forward, method=tiny.METHOD, **options):
    loss = model_loss(forward, classification)
    return pj.training(method, loss, optax.sgd(1.0), grad_norm=True, **options)


def batch_of_unequal_weights():
    batch = make_batch(tiny.data(), range(8), 8)
    batch["weights"] = np.array([1, 1, 0, 2, 0.5, 0, 0, 1], np.float32)
    return batch


def test_losses_against_numpy():
    logits = np.array([[2.0, 0.0, 1.0], [0.0, 3.0, 0.0], [1.0, 1.0, 5.0]])
    labels, weights = np.array([0, 0, 2]), np.array([1.0, 2.0, 0.0])
    each = np.log(np.exp(logits).sum(axis=1)) - logits[range(3), labels]
    half = jnp.asarray(logits, jnp.bfloat16)
    assert cross_entropy(half, {"labels": labels}).dtype == jnp.float32
    np.testing.assert_allclose(cross_entropy(half, {"labels": labels}), each.mean(), rtol=1e-6)
    np.testing.assert_allclose(
        cross_entropy(half, {"labels": labels, "weights": weights}), (each[0] + 2 * each[1]) / 3, rtol=1e-6
    )
    np.testing.assert_allclose(accuracy(half, {"labels": labels, "weights": weights}), 1 / 3, rtol=1e-6)


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_is_the_whole_batch(parts):
    batch, results = batch_of_unequal_weights(), []
    for accumulation in (1, parts):
        training = training_of(deterministic, accumulation=accumulation)
        state, metrics = training.step(training.begin(*tiny.parameters(), KEY), batch)
        results.append((state.trainable, metrics))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *results)
    assert results[0][1]["grad_norm"] > 0.1


@pytest.mark.slow
def test_step_is_the_weighted_mean_gradient():
    frozen, trainable = tiny.parameters()
    batch = batch_of_unequal_weights()

    def loss(trainable):
        logits = tiny.forward({**frozen.params, **trainable}, batch)
        return cross_entropy(logits, batch)

    value, gradient = jax.value_and_grad(loss)(trainable)
    expected = jax.tree.map(lambda p, g: p - g, trainable, gradient)
    training = training_of(deterministic)
    before = training.begin(frozen, trainable, KEY)
    state, metrics = training.step(before, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.trainable, expected)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-6)
    assert before.trainable["head"]["kernel"].is_deleted()
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((frozen, trainable)))


def test_evaluation_counts_each_example_once():
    frozen, trainable = tiny.parameters()
    trainable["head"]["kernel"] = jax.random.normal(jax.random.key(2), (16, 3))
    split = tiny.data()
    evaluate = make_evaluate(tiny.forward, tiny.METHOD, classification)
    results = [
        evaluate(trainable, frozen, tiny.batches.evaluation_batches(split, size)) for size in (100, 64)
    ]
    assert results[0]["accuracy"] == pytest.approx(results[1]["accuracy"], abs=1e-7)
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], rel=1e-5)
    assert 0 < results[0]["accuracy"] < 1


@pytest.mark.parametrize("parts", [1, 2])
def test_a_penalty_in_the_gradient_is_not_divided_by_the_batch(parts):
    """A method may add to its gradient what is not of the batch: it is added once, however many parts."""
    frozen, trainable = tiny.parameters()
    batch = batch_of_unequal_weights()

    @jax.custom_vjp
    def penalized(leaf):
        return leaf

    penalized.defvjp(lambda leaf: (leaf, None), lambda _, g: (g + 1.0,))
    plain, added = tiny.METHOD.apply, lambda f, t, key=None: tiny.METHOD.apply(f, jax.tree.map(penalized, t))
    ends = []
    for apply in (plain, added):
        method = replace(tiny.METHOD, apply=apply)
        training = training_of(deterministic, method, accumulation=parts)
        ends.append(training.step(training.begin(frozen, trainable, KEY), batch)[0].trainable)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a - 1.0, b, rtol=1e-5, atol=1e-6), *ends)


def test_what_a_method_holds_is_not_accumulated():
    params = {"up": {"kernel": jnp.ones((6, 10))}}
    method = pj.galore(rank=2)

    def forward(params, batch, *, key=None):
        return batch["x"] @ params["up"]["kernel"]

    training = training_of(forward, method, accumulation=2)
    batch = {"x": jnp.ones((4, 6)), "labels": jnp.zeros(4, jnp.int32), "weights": jnp.ones(4)}
    state = training.advance(training.start(KEY, params), batch)
    given = state.trainable, state.opt_state, *divided(state.frozen, training.moves), batch, KEY
    jaxpr = jax.make_jaxpr(training.run_step)(*given).jaxpr
    scan = next(e for e in jaxpr.eqns if e.primitive.name == "scan")
    carried = [v.aval.shape for v in scan.outvars]
    assert (2, 10) in carried
    assert (6, 10) not in carried


@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_batch_of_which_nothing_counts_is_a_step_of_zero_gradients(accumulation):
    batch = batch_of_unequal_weights() | {"weights": np.zeros(8, np.float32)}
    frozen, trainable = tiny.parameters()
    training = training_of(deterministic, accumulation=accumulation)
    state, metrics = training.step(training.begin(frozen, trainable, KEY), batch)
    jax.tree.map(np.testing.assert_array_equal, state.trainable, trainable)
    assert {name: float(value) for name, value in metrics.items()} == {
        "loss": 0.0,
        "accuracy": 0.0,
        "grad_norm": 0.0,
    }


@pytest.mark.parametrize("accumulation", [1, 4])
def test_masked_rows_with_infinite_or_undefined_logits_change_nothing(accumulation):
    def forward(params, batch, *, key=None):
        logits = tiny.forward(params, batch)
        poison = jnp.where(batch["weights"][:, None] == 0, jnp.array([jnp.inf, -jnp.inf, jnp.nan]), 0.0)
        return logits + batch["poisoned"][:, None] * jnp.where(batch["poisoned"][:, None] > 0, poison, 0.0)

    results = []
    for poisoned in (np.zeros(8, np.float32), np.ones(8, np.float32)):
        training = training_of(forward, accumulation=accumulation)
        batch = batch_of_unequal_weights() | {"poisoned": poisoned}
        state, metrics = training.step(training.begin(*tiny.parameters(), KEY), batch)
        results.append((state.trainable, metrics))
    jax.tree.map(np.testing.assert_array_equal, *results)
    assert np.isfinite(results[1][1]["loss"])


@pytest.mark.slow
def test_the_mean_of_no_weight_is_zero_with_a_gradient_of_zero():
    batch = {"labels": jnp.array([0, 1]), "weights": jnp.zeros(2)}
    value, gradient = jax.value_and_grad(cross_entropy)(jnp.array([[1.0, 2.0], [jnp.inf, 0.0]]), batch)
    assert value == accuracy(jnp.ones((2, 2)), batch) == 0.0
    np.testing.assert_array_equal(gradient, np.zeros((2, 2)))


@pytest.mark.parametrize("batches", [[], [batch_of_unequal_weights() | {"weights": np.zeros(8, np.float32)}]])
def test_an_evaluation_of_which_nothing_counts_says_so(batches):
    frozen, trainable = tiny.parameters()
    evaluate = make_evaluate(tiny.forward, tiny.METHOD, classification)
    with pytest.raises(pj.PeftError, match="no example of the evaluation counts"):
        evaluate(trainable, frozen, batches)


@pytest.mark.parametrize("name", ["adamw", pytest.param("galore", marks=pytest.mark.slow)])
def test_an_optimizer_on_the_host_trains_the_same(name):
    galore = pj.galore(rank=2, every=2, targets="head/kernel")
    method = {"adamw": tiny.METHOD, "galore": galore}[name]
    params = {**tiny.base(), **tiny.parameters()[1]}
    batch, results = batch_of_unequal_weights(), []
    for memory in ("device", "pinned_host"):
        loss = model_loss(deterministic, classification)
        training = pj.training(method, loss, optax.adamw(1e-2), optimizer_memory=memory)
        state = training.start(KEY, params)
        for _ in range(3):
            kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim}
            assert kinds == {memory}
            state, _ = training.step(state, batch)
        results.append(jax.tree.leaves((state.trainable, state.opt_state, state.frozen.state)))
    for here, there in zip(*results, strict=True):
        np.testing.assert_array_equal(here, there)


def test_a_memory_that_is_none_is_an_error():
    with pytest.raises(PeftError, match=r"optimizer_memory must be one of device, pinned_host"):
        training_of(deterministic, optimizer_memory="host")
