"""The rank of an adapter raised in mid-training: the same function, and directions that can learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import KEY, assert_close, assert_equals_merged, assert_no_dense_gradient, noisy, normal

import peftjax as pj
from peftjax.core.errors import PeftError

PARAMS = {
    "up": {"kernel": normal(KEY, (8, 12))},
    "layers": {"down": {"kernel": normal(KEY, (3, 12, 8)) / 3}},
    "conv": {"kernel": normal(KEY, (3, 8, 6)) / 4},
    "experts": normal(KEY, (2, 6, 8)),
    "words": {"embedding": normal(KEY, (9, 8))},
}
LAYOUTS = {"experts": "sio", "conv/kernel": "iio"}
IDS = jnp.array([[0, 3, 8, 1, 1], [2, 2, 7, 4, 5]])


def forward(params, ids):
    x = params["words"]["embedding"][ids]
    for layer in range(3):
        x = x + jnp.tanh(x @ params["up"]["kernel"]) @ params["layers"]["down"]["kernel"][layer]
    x = jax.lax.conv_general_dilated(
        x, params["conv"]["kernel"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )
    return jax.lax.ragged_dot(x.reshape(-1, 6), params["experts"], jnp.array([6, 4]))


def adapter(method=None, trained=True, **options):
    if method is None:
        method = pj.lora(**{"rank": 2, "targets": ".*", "layouts": LAYOUTS, **options})
    frozen, trainable = method.init(KEY, PARAMS)
    return method, frozen, noisy(trainable) if trained else trainable


def merged(method, frozen, trainable):
    return method.merge(frozen, trainable)


def gradients(method, trainable):
    frozen, _ = method.init(KEY, PARAMS)
    loss = lambda t: jnp.sum(jnp.sin(pj.adapt(forward)(method.apply(frozen, t), IDS)))
    return jax.jit(jax.grad(loss))(trainable)


def assert_each_direction_can_learn(method, trainable):
    for path, slots in gradients(method, trainable).items():
        moves = [np.abs(np.asarray(slots[name])).max(-1) for name in ("a", "b")]
        assert (np.maximum(*moves) > 0).all(), path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "trained"),
    [({}, False), ({"rslora": True}, True), ({"rank_pattern": {"up": 3, "experts": 1}}, True)],
)
def test_a_larger_rank_keeps_the_function_and_every_direction_can_learn(options, trained):
    one = adapter(trained=trained, **options)
    method, trainable = pj.adapters.combine([one], rank=4)
    frozen, _ = method.init(KEY, PARAMS)
    assert {path: slots["a"].shape[-2] for path, slots in trainable.items()} == dict.fromkeys(trainable, 4)
    assert_close(merged(method, frozen, trainable), merged(*one))
    assert_each_direction_can_learn(method, trainable)
    for path, slots in one[2].items():  # what was learned stands first, as it was
        np.testing.assert_array_equal(trainable[path]["a"][..., : slots["a"].shape[-2], :], slots["a"])


@pytest.mark.slow
def test_a_grown_adapter_trains_as_any_other():
    method, _ = pj.adapters.combine([adapter()], rank=4)
    assert_equals_merged(forward, PARAMS, method, IDS)
    assert_no_dense_gradient(forward, PARAMS, method, IDS)


@pytest.mark.slow
def test_the_rank_grows_to_at_most_that_of_each_matrix():
    _, trainable = pj.adapters.combine([adapter()], rank=7)
    assert trainable["up/kernel"]["a"].shape[-2] == 7
    assert trainable["experts"]["a"].shape[-2] == 6


def test_new_directions_are_the_same_each_time_and_others_with_another_key():
    one = adapter()
    first, again = (pj.adapters.combine([one], rank=4)[1] for _ in range(2))
    other = pj.adapters.combine([one], rank=4, key=jax.random.key(5))[1]
    new = lambda trainable, path="up/kernel": np.asarray(trainable[path]["a"][2:])
    np.testing.assert_array_equal(new(first), new(again))
    assert not np.array_equal(new(first), new(other))
    assert not np.array_equal(new(first)[0], new(first)[1])


@pytest.mark.slow
def test_fresh_adapters_cut_to_a_rank_do_not_end_with_both_factors_zero():
    pair = [adapter(trained=False), adapter(trained=False)]
    method, trainable = pj.adapters.combine(pair, rank=3)
    assert_close(merged(method, method.init(KEY, PARAMS)[0], trainable), PARAMS)
    assert_each_direction_can_learn(method, trainable)


@pytest.mark.slow
def test_a_sum_of_less_rank_than_directions_can_learn_in_all_of_them():
    one = adapter()
    method, trainable = pj.adapters.combine([one, one], [0.5, 0.5], rank=4)
    assert_close(merged(method, method.init(KEY, PARAMS)[0], trainable), merged(*one))
    assert all((np.abs(slots["a"]).max(-1) > 1e-3).all() for p, slots in trainable.items() if p[0] != "w")


def test_layers_without_an_adapter_get_none_by_growing():
    one = adapter(targets=["down"], layouts=None, layers=1)
    _, trainable = pj.adapters.combine([one], rank=4)
    used = np.abs(np.asarray(trainable["layers/down/kernel"]["a"])).max((1, 2)) > 0
    assert used.tolist() == [False, True, False]


@pytest.mark.slow
def test_a_dora_grows_into_a_dora_and_is_not_cut():
    one = adapter(pj.dora(rank=2, targets=".*kernel", layouts={"conv/kernel": "iio"}))
    method, trainable = pj.adapters.combine([one], rank=4)
    assert method.name == "dora"
    assert_close(merged(method, method.init(KEY, PARAMS)[0], trainable), merged(*one))
    assert_each_direction_can_learn(method, trainable)
    with pytest.raises(PeftError, match="is a ColumnNormalized, not its base plus"):
        pj.adapters.combine([one], rank=1)
