"""Whether rounding decides the first step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import peftjax as pj
from peftjax.train.first_step import uncertain_signs

X = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)


def of(method, targets):
    """The shares for the mean of `y (x w)`: no gradient where y is orthogonal to all columns of x."""
    run = pj.training(
        method,
        lambda params, batch: jnp.mean(pj.matmul(batch["x"], params["w"]) * batch["y"]),
        optax.adam(1e-3),
    )
    state = run.start(jax.random.key(0), {"w": jnp.ones((5, 4))})
    return uncertain_signs(run, state, {"x": X, "y": targets})


def test_columns_whose_rows_cancel_are_named():
    targets = np.ones((6, 4), np.float32)
    # Orthogonal to every column of x: the gradient of these outputs is zero but for rounding.
    null = np.linalg.svd(X.T.astype(np.float64))[2][-1].astype(np.float32)
    targets[:, 2:] = null[:, None]
    shares = of(pj.lora(rank=2, targets=["w"]), targets)
    assert shares["w/a"] == 0.0  # exactly zero while b is: it does not move
    assert 0.3 <= shares["w/b"] <= 0.5  # the vector above is rounded too
    shares = of(pj.lora(rank=2, targets=["w"], init="zero_a"), targets)
    assert shares == {"w/a": 0.0, "w/b": 0.0}
    assert 0.3 <= of(pj.full(), targets)["w"] <= 0.5


def test_one_row_has_one_order():
    run = pj.training(pj.full(), lambda params, x: jnp.sum(params["w"] * x), optax.adam(1e-3))
    state = run.start(jax.random.key(0), {"w": jnp.ones(3)})
    with pytest.raises(pj.PeftError, match="give two or more"):
        uncertain_signs(run, state, jnp.ones((1, 3)))
