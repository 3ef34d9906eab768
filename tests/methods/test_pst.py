"""PST: its gradients, its masks at every step of a training, and what is never kept."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import KEY, noisy, normal

import peftjax as pj
from peftjax.core.errors import PeftError
from peftjax.methods.sparse._gradual import Gradual
from peftjax.weights.score_pruned import smallest_kept

N, M, PATH = 8, 6, "up/kernel"
PARAMS = {"up": {"kernel": normal(KEY, (N, M))}}
X = normal(jax.random.key(1), (5, N))
TARGET = normal(jax.random.key(2), (5, M))


def loss(params, x=X):
    return jnp.sum((x @ params["up"]["kernel"] - TARGET) ** 2)


def scored(own):
    """The weight before it is pruned, and its scores, in NumPy."""
    own = {name: np.asarray(value, np.float64) for name, value in own.items()}
    new = np.asarray(PARAMS["up"]["kernel"], np.float64) + own["a"].T @ own["b"]
    return new, np.abs(new) + own["c"].T @ own["d"] + own["inputs"][:, None] + own["outputs"]


def pattern_of(scores, kept, of):
    places = np.argsort(np.argsort(-scores.reshape(-1, of, M), axis=1), axis=1)
    return (places < kept).reshape(scores.shape)


@pytest.mark.parametrize("pattern", [None, "1:4"])
def test_gradients_are_the_formulas_and_the_scores_take_that_of_the_mask(pattern):
    method = pj.pst(rank=2, importance_rank=3, initial_sparsity=0.4, total_steps=10, pattern=pattern)
    frozen, fresh = method.init(KEY, PARAMS)
    frozen = method.advance(None, frozen, fresh, None, step=0, key=KEY, tx=optax.sgd(1.0))[0]
    trainable = noisy(fresh)

    @jax.jit
    def gradients(trainable, x):
        return jax.grad(lambda t, x: pj.adapt(loss)(method.apply(frozen, t), x), (0, 1))(trainable, x)

    got, dx = gradients(trainable, X)
    own = trainable[PATH]
    new, scores = scored(own)
    cut = np.sort(scores, axis=None)[int(0.4 * N * M)]
    mask = scores >= cut if pattern is None else pattern_of(scores, 1, 4)
    assert (~mask).sum() == (int(0.4 * N * M) if pattern is None else 36)
    x, own = np.asarray(X, np.float64), {name: np.asarray(v, np.float64) for name, v in own.items()}
    g = 2 * (x @ (new * mask) - np.asarray(TARGET, np.float64))
    dense = x.T @ g
    of_scores, of_new = dense * new, dense * (mask + np.abs(new))
    wanted = {
        "a": own["b"] @ of_new.T,
        "b": own["a"] @ of_new,
        "c": own["d"] @ of_scores.T,
        "d": own["c"] @ of_scores,
        "inputs": of_scores.sum(1),
        "outputs": of_scores.sum(0),
    }
    assert got[PATH].keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(got[PATH][name], value, rtol=1e-4, atol=1e-4 * np.abs(value).max())
    np.testing.assert_allclose(dx, g @ (new * mask).T, rtol=1e-4, atol=1e-4)
    # The same for all rows, or for all columns, prunes the same.
    np.testing.assert_allclose(got[PATH]["inputs"].sum(), got[PATH]["outputs"].sum(), rtol=1e-4)
    moved = {PATH: {**trainable[PATH], "inputs": trainable[PATH]["inputs"] + 3.0}}
    same = [method.merge(frozen, one)["up"]["kernel"] for one in (trainable, moved)]
    np.testing.assert_array_equal(*same)
    np.testing.assert_allclose(same[0], new * mask, atol=1e-6)


def test_it_starts_as_the_base_or_as_magnitude_pruning():
    for share in (0.0, 0.5):
        method = pj.pst(rank=2, importance_rank=0, initial_sparsity=share, total_steps=10)
        frozen, fresh = method.init(KEY, PARAMS)
        w = PARAMS["up"]["kernel"]
        kept = np.abs(w) >= np.sort(np.abs(w), axis=None)[int(share * N * M)]
        np.testing.assert_array_equal(method.merge(frozen, fresh)["up"]["kernel"], w * kept)
        assert set(fresh[PATH]) == {"a", "b", "inputs", "outputs"}


def test_the_schedule_is_the_papers():
    gradual = Gradual(
        sparsity=0.9, initial_sparsity=0.0, total_steps=100, init_warmup=10, final_warmup=30, every=1
    )
    target = pj.pst(rank=1, total_steps=10).init(KEY, PARAMS)[0].plan[0]
    size = N * M
    at = {step: int(gradual.pruned(jnp.int32(step), target)) for step in range(101)}
    assert at[0] == at[10] == 0
    assert at[70] == at[100] == int(0.9 * size)
    assert at[40] == int(0.9 * size) - round(int(0.9 * size) / 8)
    assert sorted(at.values()) == list(at.values())
    assert [step for step in range(100) if gradual.due(step)] == list(range(11, 71))


@pytest.mark.parametrize("options", [{"sparsity": 0.8, "total_steps": 10}, {"pattern": "2:4"}])
def test_masks_hold_after_every_step_and_after_merge(options):
    params = {"up": {"kernel": normal(KEY, (2, N, M))}}
    method = pj.pst(rank=2, **options)

    def stacked(params, batch):
        kernels, widen = params["up"]["kernel"], jnp.eye(M, N)
        y, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w) @ widen, None), batch["x"], kernels)
        return jnp.mean((y[:, :M] - TARGET) ** 2)

    training = pj.training(method, lambda params, batch: pj.adapt(stacked)(params, batch), optax.adam(0.05))
    state, counts = training.start(KEY, params), []
    for _ in range(10):
        state, _ = training.step(state, {"x": X})
        merged = np.asarray(method.merge(state.frozen, state.trainable)["up"]["kernel"])
        if "pattern" in options:
            assert ((merged.reshape(2, -1, 4, M) != 0).sum(axis=2) == 2).all()
        counts.append({int((one == 0).sum()) for one in merged})
    if "sparsity" in options:
        part = [max(0.0, 1 - (step - 1) / 6) if step > 1 else 1.0 for step in range(10)]
        assert counts == [{38 - round(38 * p**3)} for p in part]
        assert int(0.8 * N * M) == 38
    adapted = pj.adapt(stacked)(method.apply(state.frozen, state.trainable), {"x": X})
    dense = stacked(method.merge(state.frozen, state.trainable), {"x": X})
    np.testing.assert_allclose(adapted, dense, rtol=1e-5)


def test_a_threshold_is_found_by_counting():
    scores = normal(jax.random.key(3), (7, 9)).at[0].set(0.25).at[1, 1].set(-0.0)
    found = jax.jit(jax.vmap(smallest_kept, (None, 0)))(scores, jnp.arange(63))
    np.testing.assert_array_equal(found, np.sort(np.asarray(scores), axis=None))


def test_layers_keep_nothing_of_a_weights_size_and_have_one_gradient_at_a_time():
    width, tokens = 256, 4
    method = pj.pst(rank=2, initial_sparsity=0.5, total_steps=10)

    def layers(params, x):
        return jnp.sum(jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["up"]["kernel"])[0])

    def temporary(depth):
        params = {"up": {"kernel": jax.ShapeDtypeStruct((depth, width, width), jnp.float32)}}
        frozen, trainable = jax.eval_shape(lambda p: method.init(KEY, p), params)
        frozen = pj.Frozen(frozen.params, frozen.state, frozen.plan)

        def gradient(trainable, frozen, x):
            return jax.grad(lambda t: pj.adapt(layers)(method.apply(frozen, t), x))(trainable)

        x = jax.ShapeDtypeStruct((tokens, width), jnp.float32)
        return jax.jit(gradient).lower(trainable, frozen, x).compile().memory_analysis().temp_size_in_bytes

    few, many = temporary(2), temporary(10)
    weight = 4 * width * width
    assert many - few < weight  # of eight layers more
    assert few < 12 * weight


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give them, or a pattern"),
        ({"pattern": "4:2"}, "pattern is 'n:m'"),
        ({"total_steps": 3, "init_warmup": 2, "final_warmup": 1}, "leave none between warm-ups"),
        ({"total_steps": 3, "sparsity": 1.0}, "sparsity must be in"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(PeftError, match=message):
        pj.pst(**options)


def test_a_pattern_has_to_divide_the_inputs():
    with pytest.raises(PeftError, match="groups of 5 do not divide"):
        pj.pst(rank=1, pattern="2:5").init(KEY, PARAMS)
