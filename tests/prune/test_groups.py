"""What goes together: traced through any function, declared by backbones, and both alike."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import normal
from tiny_decoder import make_decoder

import peftjax as pj
from peftjax.prune.group import Group, Member
from peftjax.prune.traced import traced_groups

KEY = jax.random.key(0)


def mlp(params, x):
    hidden = jax.nn.gelu(x @ params["up"]["kernel"] + params["up"]["bias"])
    return hidden @ params["down"]["kernel"] + params["down"]["bias"]


def mlp_params(inner=8):
    return {
        "up": {"kernel": normal(jax.random.key(1), (4, inner)), "bias": normal(jax.random.key(2), (inner,))},
        "down": {"kernel": normal(jax.random.key(3), (inner, 3)), "bias": normal(jax.random.key(4), (3,))},
    }


def conv(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def residual_net(params, x):
    """Two convolutions whose results are added, a scale and a shift of channels, and the image read flat."""
    first = conv(x, params["stem"])
    inner = jax.nn.relu(conv(first, params["inner"]))
    out = first + conv(inner, params["outer"])
    out = jax.nn.relu(out * params["scale"] + params["shift"])
    return out.reshape(len(x), -1) @ params["head"]


def residual_params():
    keys = iter(jax.random.split(jax.random.key(5), 6))
    return {
        "stem": normal(next(keys), (3, 3, 2, 6)),
        "inner": normal(next(keys), (3, 3, 6, 5)),
        "outer": normal(next(keys), (3, 3, 5, 6)),
        "scale": normal(next(keys), (6,)),
        "shift": normal(next(keys), (6,)),
        "head": normal(next(keys), (4 * 4 * 6, 3)),
    }


IMAGES = normal(jax.random.key(6), (2, 4, 4, 2))
CASES = {
    "mlp": (mlp, mlp_params(), normal(KEY, (5, 4))),
    "residual": (residual_net, residual_params(), IMAGES),
}


def test_a_residual_sum_ties_filters_and_a_flat_reader_repeats_them():
    groups = pj.prune.groups_of(residual_net, residual_params(), IMAGES)
    assert set(groups) == {"outer", "inner"}
    assert {group.kind for group in groups.values()} == {"filter"}
    assert groups["inner"].count == 5
    assert set(groups["inner"].members) == {Member("inner", 3), Member("outer", 2, reads=True)}
    assert set(groups["outer"].members) == {
        Member("stem", 3),
        Member("inner", 2, reads=True),
        Member("outer", 3),
        Member("scale", 0),
        Member("shift", 0),
        Member("head", 0, repeat=16, reads=True),
    }


@pytest.mark.parametrize("case", CASES)
def test_a_sliced_function_is_the_masked_one(case):
    fn, params, x = CASES[case]
    groups = pj.prune.groups_of(fn, params, x)
    scores = pj.prune.pooled(pj.prune.magnitude(params, targets=".*"), groups)
    kept = pj.prune.select(scores, 0.6)
    for name, group in groups.items():
        assert int(kept[name].sum()) == int(0.6 * group.count + 0.5)
    small = pj.prune.sliced(fn, params, groups, kept)
    zeros = pj.prune.masked(fn, params, groups, kept)
    run = jax.jit(fn)
    want = run(params, x)
    got, masked = run(small.params, x), run(zeros.params, x)
    np.testing.assert_allclose(got, masked, atol=1e-5 * np.abs(want).max())
    assert np.abs(got - want).max() > 1e-3
    whole = pj.prune.sliced(fn, params, groups, pj.prune.select(scores, 1.0))
    jax.tree.map(np.testing.assert_array_equal, whole.params, params)


def test_what_a_norm_a_sum_or_a_constant_is_over_is_left_alone():
    params = {"a": jnp.ones((4, 6)), "b": jnp.ones((6, 5)), "scale": jnp.ones(6)}
    x = jnp.ones((2, 4))

    def found(inner):
        return traced_groups(lambda p, x: inner(x @ p["a"], p) @ p["b"], params, x)

    assert set(found(lambda h, p: jnp.tanh(h * p["scale"]))) == {"a"}
    assert found(lambda h, p: h / jnp.linalg.norm(h, axis=-1, keepdims=True)) == {}
    assert found(lambda h, p: h - h.mean()) == {}
    assert found(lambda h, p: jax.nn.softmax(h)) == {}
    assert found(lambda h, p: h * np.arange(6.0)) == {}
    assert found(lambda h, p: h * x[:1, :1] + jnp.sort(h)) == {}
    assert found(lambda h, p: jnp.concatenate([h[:, :2], h[:, 2:]], -1)) == {}
    with pytest.raises(pj.PeftError, match="no axis of this function can be cut"):
        pj.prune.groups_of(lambda p, x: jax.nn.softmax(x @ p["a"]) @ p["b"], params, x)
    with pytest.raises(pj.PeftError, match="give an example of each input"):
        pj.prune.groups_of(mlp, mlp_params())


def test_a_scan_has_units_in_each_layer_and_shares_what_it_carries():
    params = {
        "in": jnp.ones((4, 6)),
        "up": jnp.ones((3, 6, 8)),
        "down": jnp.ones((3, 8, 6)),
        "out": jnp.ones((6, 2)),
    }

    def fn(params, x):
        def layer(h, weights):
            return h + jnp.tanh(h @ weights["up"]) @ weights["down"], None

        stacked = {name: params[name] for name in ("up", "down")}
        return jax.lax.scan(layer, x @ params["in"], stacked)[0] @ params["out"]

    groups = pj.prune.groups_of(fn, params, jnp.ones((2, 4)))
    inner = (Member("down", 1, reads=True), Member("up", 2))
    assert groups["up"] == Group("neuron", inner, 8, (3,))
    carried = groups["down"]
    assert (carried.stack, carried.count) == ((), 6)
    assert {member.path for member in carried.members} == {"in", "up", "down", "out"}


def test_the_trace_of_a_backbone_finds_what_it_declares():
    model, params = make_decoder()
    batch = {"input_ids": jax.ShapeDtypeStruct((2, 5), jnp.int32)}
    traced = traced_groups(lambda params, batch: model(params, batch).dense(), params, batch).values()
    found = [(group.count, group.stack, set(group.members)) for group in traced]
    declared = pj.prune.groups_of(model, params)
    assert set(declared) == {"heads", "neurons", "layers"}
    for name in ("heads", "neurons"):
        group = declared[name]
        assert (group.count, group.stack, set(group.members)) in found
