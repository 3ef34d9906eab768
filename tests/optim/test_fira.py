"""Fira against the released algorithm, written out in NumPy's float64 on torch's layout."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimizing
import pytest
from support import KEY, normal

from peftjax.core.errors import PeftError
from peftjax.optim import fira, galore

SHAPES = {"up": (6, 10), "down": (10, 6), "square": (6, 6)}
STACK, RATES = (2, 4, 8), optax.linear_schedule(0.1, 0.0, 10)


def tree_of(step):
    keys = jax.random.split(jax.random.fold_in(KEY, step), 5)
    kernels = {name: {"kernel": normal(k, s)} for (name, s), k in zip(SHAPES.items(), keys)}
    rest = {"blocks": {"fc": {"kernel": normal(keys[3], STACK)}}, "head": {"kernel": normal(keys[4], (6, 4))}}
    return {**kernels, **rest}


# The third gradient is far larger than those before it: the limiter acts.
PARAMS = tree_of(99)
GRADS = [jax.tree.map(lambda g, n=n: g * (30.0 if n == 2 else 1.0), tree_of(n)) for n in range(7)]


def released(w, grads, *, rank, every, scale, weight_decay, eps=1e-6):
    """The weights `[out, in]` after all steps, and how often the limiter acted."""
    w, (b1, b2), first, second, size, acted = w.astype(np.float64), (0.9, 0.999), 0.0, 0.0, None, 0
    for t, g in enumerate(np.asarray(grads, np.float64), 1):
        right = g.shape[0] >= g.shape[1]
        if (t - 1) % every == 0:
            u, _, vh = np.linalg.svd(g, full_matrices=False)
            q = vh[:rank] if right else u[:, :rank].T
            largest = np.take_along_axis(q, np.abs(q).argmax(1)[:, None], 1)
            q = q * np.sign(largest)
        r = g @ q.T if right else q @ g
        first, second = b1 * first + (1 - b1) * r, b2 * second + (1 - b2) * r**2
        normed = first / (np.sqrt(second) + eps)
        axis = 0 if normed.shape[0] < normed.shape[1] else 1
        factor = np.linalg.norm(normed, axis=axis) / (np.linalg.norm(r, axis=axis) + 1e-8)
        back = (lambda x, q=q: x @ q) if right else (lambda x, q=q: q.T @ x)
        rest = (g - scale * back(r)) * (factor[:, None] if axis == 1 else factor)
        norm = np.linalg.norm(rest)
        if size is not None:
            limiter = max(norm / (size + 1e-8), 1.01) / 1.01
            acted += limiter > 1
            rest, norm = rest / limiter, norm / limiter
        size = norm
        rate = float(RATES(t - 1))
        w = w - rate * np.sqrt(1 - b2**t) / (1 - b1**t) * (scale * back(normed) + rest)
        w = w - rate * weight_decay * w
    return w, acted


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_the_released_algorithm_through_two_refreshes(scale):
    options = {"rank": 3, "every": 3, "scale": scale, "weight_decay": 0.1}
    params, *_ = optimizing.train(fira(RATES, basis="svd", **options), PARAMS, GRADS)
    matrices = [(params[name], PARAMS[name], [g[name] for g in GRADS], ()) for name in SHAPES]
    fc = params["blocks"]["fc"], PARAMS["blocks"]["fc"], [g["blocks"]["fc"] for g in GRADS]
    limited = 0
    for got, start, grads, at in [*matrices, (*fc, (0,)), (*fc, (1,))]:
        torch = [np.asarray(g["kernel"])[at].T for g in grads]
        wanted, acted = released(np.asarray(start["kernel"])[at].T, torch, **options)
        np.testing.assert_allclose(np.asarray(got["kernel"])[at], wanted.T, atol=5e-5)
        limited += acted
    assert limited >= 5


def test_everything_else_has_the_same_adam():
    params, *_ = optimizing.train(fira(0.1, rank=3), PARAMS, GRADS[:2])
    plain, *_ = optimizing.train(fira(0.1, rank=3, targets=["up"]), PARAMS, GRADS[:2])
    np.testing.assert_allclose(params["head"]["kernel"], plain["head"]["kernel"], atol=1e-6)
    assert float(jnp.abs(params["down"]["kernel"] - plain["down"]["kernel"]).max()) > 1e-3


def test_it_keeps_a_number_a_matrix_more_than_galore():
    sizes = {}
    for make in (fira, galore):
        state = jax.eval_shape(make(0.1, rank=3).init, PARAMS)
        sizes[make] = sum(leaf.size for leaf in jax.tree.leaves(state))
    assert sizes[fira] == sizes[galore] + 5


def test_without_a_rest_it_is_galore():
    def first_row(g):
        return jnp.zeros_like(g).at[..., :1, :].set(g[..., :1, :])

    grads = [jax.tree.map(first_row, own) for own in GRADS[:3]]
    both = [
        optimizing.train(make(0.1, rank=1, scale=1.0, every=1, basis="svd"), PARAMS, grads)[0]
        for make in (fira, galore)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), *both)


@pytest.mark.slow
def test_sharded():
    optimizing.assert_same_when_sharded(
        fira(0.01, rank=3, every=2, weight_decay=0.1), PARAMS, GRADS[:4], 2e-5
    )


@pytest.mark.slow
def test_a_run_goes_on_bit_by_bit_from_its_checkpoint(tmp_path):
    optimizing.assert_resumes(fira(RATES, rank=3, every=2, weight_decay=0.1), PARAMS, GRADS[:6], tmp_path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"side": "both"}, "side cannot be 'both'"),
        ({"scale": 0.0}, "scale must be positive, got 0.0"),
        ({"growth": 0.5}, "growth must be 1.0 or more, got 0.5"),
    ],
)
def test_a_setting_out_of_range(options, said):
    with pytest.raises(PeftError, match=f"fira: .*{said}"):
        fira(0.1, rank=2, **options)
