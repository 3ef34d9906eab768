"""PaCA: rows trained in the weight itself."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import KEY, normal
from tiny_models import moved

import peftjax as pj
from peftjax.adapters.files import CONFIG, load_adapter, save_adapter
from peftjax.core import tree
from peftjax.core.errors import PeftError

PARAMS = {
    "up": {"kernel": normal(KEY, (12, 7))},
    "down": {"kernel": normal(KEY, (7, 9))},
}
X = normal(KEY, (5, 12))


def model(params, x):
    return jnp.tanh(x @ params["up"]["kernel"]) @ params["down"]["kernel"]


def loss_of(method, frozen):
    return lambda trainable, x: jnp.sum(jnp.sin(pj.adapt(model)(method.apply(frozen, trainable), x)))


def rows_of(frozen, path):
    return np.asarray(frozen.state[path]["rows"])


@pytest.mark.slow
def test_step_0_is_the_base_model_bit_by_bit():
    method = pj.paca(rank=4, alpha=8.0)
    out = pj.adapt(model)(method.apply(*method.init(KEY, PARAMS)), X)
    np.testing.assert_array_equal(out, model(PARAMS, X))


@pytest.mark.slow
def test_gradients_are_the_rows_of_the_dense_ones():
    method = pj.paca(rank=3, alpha=6.0)
    frozen, trainable = method.init(KEY, PARAMS)
    found, of_x = jax.grad(loss_of(method, frozen), (0, 1))(trainable, X)
    wanted, of_dense_x = jax.grad(lambda p, x: jnp.sum(jnp.sin(model(p, x))), (0, 1))(PARAMS, X)
    for path, (module, name) in {p: p.split("/") for p in trainable}.items():
        rows = wanted[module][name][rows_of(frozen, path)]
        np.testing.assert_allclose(found[path]["values"] / 2.0, rows, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(of_x, of_dense_x, rtol=1e-5, atol=1e-6)


def test_other_rows_never_change_and_the_change_has_rank_r():
    method = pj.paca(rank=2, targets=["up"])
    frozen, trainable = method.init(KEY, PARAMS)
    merged = np.asarray(method.merge(frozen, moved(trainable))["up"]["kernel"])
    rows = rows_of(frozen, "up/kernel")
    np.testing.assert_array_equal(np.delete(merged, rows, 0), np.delete(PARAMS["up"]["kernel"], rows, 0))
    assert np.linalg.matrix_rank(merged - PARAMS["up"]["kernel"]) == len(rows) == 2


@pytest.mark.slow
def test_all_rows_are_full_fine_tuning():
    method = pj.chain(
        pj.paca(rank=12, alpha=12.0, targets=["up"]), pj.paca(rank=7, alpha=7.0, targets=["down"])
    )
    ends = []
    for one in (method, pj.full()):
        frozen, trainable = one.init(KEY, PARAMS)
        for _ in range(3):
            gradient = jax.grad(loss_of(one, frozen))(trainable, X)
            trainable = optax.apply_updates(trainable, jax.tree.map(lambda g: -0.1 * g, gradient))
        ends.append(one.merge(frozen, trainable))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), *ends)


def test_another_seed_loads_the_same_adapter(tmp_path):
    method = pj.paca(rank=3)
    frozen, trainable = method.init(jax.random.key(1), PARAMS)
    save_adapter(tmp_path, method, frozen, moved(trainable), seed=1)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**config, "seed": 2}))
    found = load_adapter(tmp_path, PARAMS)
    assert not np.array_equal(
        *(rows_of(method.init(jax.random.key(n), PARAMS)[0], "up/kernel") for n in (1, 2))
    )
    for got, want in zip(
        jax.tree.leaves(method.merge(found.frozen, found.trainable)),
        jax.tree.leaves(method.merge(frozen, moved(trainable))),
    ):
        np.testing.assert_array_equal(got, want)
    assert tree.count(trainable) == 3 * 7 + 3 * 9


def test_weights_of_one_shape_and_layers_of_a_stack_draw_their_own_rows():
    params = {name: {"kernel": jnp.zeros((4, 64, 8))} for name in ("up", "gate")}
    frozen, _ = pj.paca(rank=8).init(KEY, params)
    drawn = np.concatenate([rows_of(frozen, f"{name}/kernel") for name in params])
    assert drawn.shape == (8, 8)
    assert len({tuple(rows) for rows in drawn}) == 8
    assert (np.diff(drawn) > 0).all()


def test_given_rows_survive_the_configuration():
    method = pj.build(json.loads(json.dumps(pj.describe(pj.paca(selection={"up": (5, 1)}, rank=3)))))
    frozen, trainable = method.init(KEY, PARAMS)
    np.testing.assert_array_equal(rows_of(frozen, "up/kernel"), [1, 5])
    np.testing.assert_allclose(
        4.0 * trainable["up/kernel"]["values"], PARAMS["up"]["kernel"][jnp.array([1, 5])]
    )
    assert rows_of(frozen, "down/kernel").shape == (3,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 8}, "rank 8 does not fit 'down/kernel', which has 7 inputs"),
        ({"selection": {"up": [1, 12]}}, "are not distinct numbers from 0 to 11"),
        ({"selection": {"up": [[1, 2]]}}, r"have shape \(1, 2\)"),
        ({"selection": {"upp": [1]}}, "'upp' matched no target"),
        ({"selection": "largest"}, "selection must be"),
        ({"alpha": 0.0}, "must be positive"),
    ],
)
def test_errors(options, message):
    with pytest.raises(PeftError, match=message):
        pj.paca(**{"rank": 2, **options}).init(KEY, PARAMS)
