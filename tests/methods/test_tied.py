"""Tied layers against the stacks that they stand for: starts, corrections, gradients, and no stack formed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import KEY, assert_close, noisy, normal
from tiny_models import BLOCKS, tiny

import peftjax as pj
from peftjax.core import tree
from peftjax.core.errors import PeftError
from peftjax.planner.residuals import kept_arrays
from peftjax.testing.weights import check_weight
from peftjax.weights.layout import layout_of
from peftjax.weights.repeated import Repeated

LAYERS, WIDTH, ROWS = 6, 5, 3
KERNEL = normal(jax.random.key(1), (LAYERS, WIDTH, WIDTH))
PARAMS = {"blocks": {"up": {"kernel": KERNEL, "bias": normal(jax.random.key(2), (LAYERS, WIDTH))}}}
X = normal(jax.random.key(3), (ROWS, WIDTH))
PATH = "blocks/up/kernel"


def forward(params, x):
    def layer(h, own):
        return jnp.tanh(h @ own["kernel"] + own["bias"]), None

    return jax.lax.scan(layer, x, params["blocks"]["up"])[0]


@pytest.mark.parametrize(
    ("options", "numbers", "picked"),
    [
        ({"repeats": 3}, [0, 1, 0, 1, 0, 1], [[0, 2, 4], [1, 3, 5]]),
        ({"repeats": 3, "start": "lower"}, [0, 1, 0, 1, 0, 1], [[0], [1]]),
        ({"repeats": 2, "start": "step"}, [0, 1, 2, 0, 1, 2], [[0], [2], [5]]),
        ({"repeats": 2, "ends": True}, [0, 1, 2, 1, 2, 3], [[0], [1, 3], [2, 4], [5]]),
        ({"repeats": 4, "ends": True, "start": "step"}, [0, 1, 1, 1, 1, 2], [[0], [2], [5]]),
        ({"repeats": 2, "ends": True, "start": "lower"}, [0, 1, 2, 1, 2, 3], [[0], [1], [2], [5]]),
    ],
)
def test_the_start(options, numbers, picked):
    """The distinct layers, and the best correction of rank r of what each layer differs from its own."""
    w = np.asarray(KERNEL)
    distinct = np.stack([w[layers].mean(0) for layers in picked])
    method = pj.tied(rank=2, **options)
    frozen, trainable = method.init(KEY, PARAMS)
    np.testing.assert_allclose(trainable[PATH]["distinct"], distinct, atol=1e-6)
    u, sizes, vt = np.linalg.svd(w - distinct[numbers])
    wanted = distinct[numbers] + np.einsum("lir,lr,lro->lio", u[..., :2], sizes[:, :2], vt[:, :2])
    np.testing.assert_allclose(method.merge(frozen, trainable)["blocks"]["up"]["kernel"], wanted, atol=1e-5)


def test_with_a_correction_of_full_rank_it_starts_as_the_model():
    for options in ({"repeats": 3}, {"repeats": 1}, {"repeats": 2, "start": "lower"}):
        method = pj.tied(rank=WIDTH, **options)
        frozen, trainable = method.init(KEY, PARAMS)
        assert_close(pj.adapt(forward)(method.apply(frozen, trainable), X), forward(PARAMS, X))
        # A layer that differs in nothing has a correction that can learn: b is zero, and a is not.
        a, b = (np.asarray(trainable[PATH][name]) for name in "ab")
        assert (np.abs(a).max(axis=(1, 2)) > 0.1).all()
        assert (np.abs(b).max(axis=(1, 2)) > 0).sum() == {3: 6, 1: 0, 2: 3}[options["repeats"]]


def test_a_distinct_layer_has_the_gradient_of_all_its_places():
    method = pj.tied(repeats=3, rank=2, train_rest=False)
    frozen, trainable = method.init(KEY, PARAMS)
    trainable = noisy(trainable)

    def loss(params):
        return jnp.sum(jnp.sin(forward(params, X)))

    got = jax.jit(jax.grad(lambda t: jnp.sum(jnp.sin(pj.adapt(forward)(method.apply(frozen, t), X)))))(
        trainable
    )[PATH]
    of_stack = np.asarray(jax.grad(loss)(method.merge(frozen, trainable))["blocks"]["up"]["kernel"])
    own = trainable[PATH]
    wanted = {
        "distinct": np.stack([of_stack[0::2].sum(0), of_stack[1::2].sum(0)]),
        "a": np.einsum("lro,lio->lri", own["b"], of_stack),
        "b": np.einsum("lri,lio->lro", own["a"], of_stack),
    }
    assert_close(got, wanted)


def test_the_distinct_layers_can_stay():
    method = pj.tied(repeats=3, rank=2, train_rest=False, train_distinct=False)
    frozen, trainable = method.init(KEY, PARAMS)
    assert {path: set(own) for path, own in trainable.items()} == {PATH: {"a", "b"}}
    assert frozen.state[PATH]["distinct"].shape == (2, WIDTH, WIDTH)
    whole = pj.tied(repeats=3, rank=2)
    shapes = jax.tree.map(jnp.shape, whole.init(KEY, PARAMS)[1])
    assert shapes == {
        PATH: {"distinct": (2, WIDTH, WIDTH), "a": (LAYERS, 2, WIDTH), "b": (LAYERS, 2, WIDTH)},
        "blocks/up/bias": {"value": (LAYERS, WIDTH)},
    }


def test_backward_keeps_what_loras_does_and_no_stack_is_formed():
    def kept(method):
        frozen, trainable = method.init(KEY, PARAMS)

        def out(trainable, frozen, x):
            return pj.adapt(forward)(method.apply(frozen, trainable), x)

        shapes = sorted(array.shape for array in kept_arrays(out, trainable, frozen, X))
        program = str(jax.make_jaxpr(jax.grad(lambda t: out(t, frozen, X).sum()))(trainable))
        return shapes, program

    shapes, program = kept(pj.tied(repeats=3, rank=2, train_rest=False))
    assert shapes == kept(pj.lora(rank=2, targets=PATH))[0]
    assert (LAYERS, ROWS, 2) in shapes
    assert f"f32[{LAYERS},{WIDTH},{WIDTH}]" not in program
    assert f"f32[2,{WIDTH},{WIDTH}]" in program


def test_experts_are_tied_one_by_one():
    model = tiny("experts")
    method = pj.tied(repeats=BLOCKS, rank=8, exclude=["blocks/feed_forward/router"])
    frozen, trainable = method.init(KEY, model.params)
    tied = [target for target, _ in frozen.plan if len(target.layout.stack) == 2]
    assert tied
    for target in tied:
        own = trainable[target.path]
        assert own["a"].shape[:2] == (BLOCKS, 3)
        assert own["distinct"].shape == (3, *target.layout.matrix)
        w = np.asarray(tree.named_leaves(model.params)[target.path])
        np.testing.assert_allclose(own["distinct"], w.mean(0), atol=1e-6)
    assert_close(method.merge(frozen, trainable)["blocks"], model.params["blocks"], 1e-5)


def test_the_weight_is_used_as_its_array():
    params = {"w": jnp.zeros((4, 3, 2))}
    layout = layout_of("w", params, {"w": "sio"})
    check_weight(Repeated(jnp.array([1, 0, 1, 1]), normal(KEY, (2, 3, 2)), layout, "float32"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"repeats": 4}, "4 repeats do not divide the 6 layers of 'blocks/up/kernel'"),
        ({"repeats": 3, "ends": True}, "do not divide the 4 layers between the first and the last"),
        ({"targets": ["head"]}, "'head/kernel' is no stack of layers; exclude it"),
        ({"layers": [0]}, "leave layers out"),
        ({"start": "upper"}, "start must be one of average, step, lower"),
    ],
)
def test_what_cannot_be_tied_is_named(options, said):
    params = {**PARAMS, "head": {"kernel": jnp.ones((WIDTH, 2))}}
    with pytest.raises(PeftError, match=said):
        pj.tied(**{"rank": 2, **options}).init(KEY, params)
