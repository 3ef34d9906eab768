"""Models that scale, normalize, shift or mask a weight before they use it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax import lax
from support import KEY, assert_close, assert_equals_merged, assert_no_dense_gradient, normal, quick_at

import peftjax as pj
from peftjax.core.errors import PeftError
from peftjax.planner.residuals import kept_arrays

N, M, E = 6, 8, 3
X = normal(KEY, (4, N))
W = normal(jax.random.key(1), (N, M))
INPUTS, OUTPUTS = (1.0 + jax.random.uniform(jax.random.key(n), (size,)) for n, size in ((2, N), (3, M)))
STACK = normal(KEY, (E, N, M))
MASK = (jax.random.uniform(KEY, (N, M)) > 0.5).astype(jnp.float32)

THIN = {
    "outputs scaled": lambda w, x: x @ (w * OUTPUTS),
    "outputs divided": lambda w, x: x @ (w / OUTPUTS[None, :]),
    "inputs scaled": lambda w, x: x @ (INPUTS[:, None] * w),
    "both sides, one after the other": lambda w, x: x @ (w * OUTPUTS / INPUTS[:, None]),
    "scaled and transposed": lambda w, x: jnp.einsum("bo,oi->bi", jnp.tanh(x @ w), (w * OUTPUTS).T),
    "scaled and looked up": lambda w, x: (w * OUTPUTS * INPUTS[:, None])[jnp.array([1, 4])],
    "scaled and cut": lambda w, x: x[:, :3] @ (w * INPUTS[:, None] * OUTPUTS)[:3, 2:6],
    "columns of length one": lambda w, x: x @ (w / jnp.linalg.norm(w, axis=0)),
    "columns of length one, kept axis": lambda w, x: x @ (w / jnp.linalg.norm(w, axis=0, keepdims=True)),
    "rows of length one": lambda w, x: x @ (w / jnp.linalg.norm(w, axis=1, keepdims=True)),
    "root of the mean square": lambda w, x: x @ (w * lax.rsqrt(jnp.mean(w**2, axis=0) + 1e-6)),
    "length of a scaled weight": lambda w, x: (
        x @ w * jnp.sqrt(jnp.sum(jnp.square(0.5 * w * OUTPUTS), axis=0))
    ),
    "mean taken off": lambda w, x: x @ (w - jnp.mean(w, axis=0)),
    "standardized": lambda w, x: x @ ((w - jnp.mean(w, axis=0)) / jnp.sqrt(jnp.var(w, axis=0) + 1e-5)),
    "shifted by outputs": lambda w, x: x @ (w + OUTPUTS),
    "shifted by inputs": lambda w, x: x @ (INPUTS[:, None] - w),
    "shifted by a number": lambda w, x: x @ (w + 0.3),
    "on another base": lambda w, x: x @ (w + W),
    "the difference to an array": lambda w, x: x @ (w - W).T.T,
    "an array without it": lambda w, x: x @ (W - w),
    "in a jitted function": lambda w, x: jax.jit(lambda w, x: x @ (w / jnp.linalg.norm(w, axis=0)))(w, x),
    "in a checkpoint": lambda w, x: jax.checkpoint(lambda w, x: x @ (w / jnp.linalg.norm(w, axis=0)))(w, x),
}
MERGED = {
    "masked": lambda w, x: x @ (w * MASK),
    "masked by booleans": lambda w, x: x @ (w * (MASK > 0)),
    "divided by a matrix": lambda w, x: x @ (w / (1.0 + MASK)),
    "masked and scaled": lambda w, x: x @ (w * MASK * OUTPUTS),
    "masked and normalized": lambda w, x: x @ ((v := w * MASK) / jnp.linalg.norm(v, axis=0)),
    "masked and looked up": lambda w, x: (w * MASK)[jnp.array([1, 4])],
    "a step along its gradient": lambda w, x: (
        x @ (w - 0.1 * jax.grad(lambda w: jnp.mean(jnp.tanh(x @ w) ** 2))(w))
    ),
}
STACKED = {
    "experts scaled": lambda w, x: jnp.einsum("td,edf->tef", x, w * jnp.arange(1.0, E + 1)[:, None, None]),
    "outputs of experts": lambda w, x: jnp.einsum("td,edf->tef", x, w * OUTPUTS),
    "inputs of experts": lambda w, x: jnp.einsum("etd,edf->etf", jnp.stack([x] * E), w * INPUTS[:, None]),
    "inputs of free experts": lambda w, x: jnp.einsum("td,edf->tef", x, w * INPUTS[:, None]),
    "normalized in a scan": lambda w, x: lax.scan(
        lambda c, w: (c + jnp.tanh(x @ (w / jnp.linalg.norm(w, axis=0))), None), jnp.zeros((4, M)), w
    )[0],
    "normalized at once": lambda w, x: x @ (w / jnp.linalg.norm(w, axis=1, keepdims=True))[1],
    "ragged": lambda w, x: lax.ragged_dot(x, w * OUTPUTS * INPUTS[:, None], jnp.array([1, 2, 1])),
}


def of(fn):
    return lambda params, x: fn(params["up"]["kernel"], x)


def held(w):
    return {"up": {"kernel": w}}


@pytest.mark.parametrize("name", quick_at(THIN | MERGED, every=2))
def test_a_changed_weight_has_the_value_and_the_gradients_of_the_merged_one(name):
    assert_equals_merged(of((THIN | MERGED)[name]), held(W), pj.lora(rank=2), X, tolerance=1e-4)


@pytest.mark.parametrize("name", THIN)
def test_a_weight_that_is_scaled_or_shifted_gets_no_dense_gradient(name):
    assert_no_dense_gradient(of(THIN[name]), held(W), pj.lora(rank=2), X)


@pytest.mark.parametrize("name", quick_at(STACKED, every=3))
def test_stacks_of_changed_weights(name):
    method = pj.lora(rank=2, layouts={".*": "sio"})
    assert_equals_merged(of(STACKED[name]), held(STACK), method, X, tolerance=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["columns of length one", "on another base"])
@pytest.mark.parametrize(
    "method",
    [pj.dora(rank=2), pj.paca(rank=2), pj.shira(density=0.2), pj.snell(rank=2)],
    ids=lambda m: m.name,
)
def test_weights_of_other_methods(method, name):
    assert_equals_merged(of((THIN | MERGED)[name]), held(W), method, X, tolerance=1e-4)


def test_a_masked_layer_keeps_its_input_and_nothing_of_the_size_of_the_weight():
    method = pj.lora(rank=2)
    frozen, trainable = method.init(KEY, held(W))
    run = pj.adapt(of(lambda w, x: jnp.tanh(x @ (w * MASK)) @ W.T))
    kept = kept_arrays(lambda t: run(method.apply(frozen, t), X), trainable)
    assert (N, M) not in {array.shape for array in kept}


@pytest.mark.slow
def test_scaled_and_normalized_kernels_of_convolutions():
    params = {"conv": {"kernel": jax.random.normal(KEY, (3, 5, M)) / 4}}
    x = jax.random.normal(KEY, (2, 7, 5))

    def forward(change):
        def run(params, x):
            kernel = change(params["conv"]["kernel"])
            return lax.conv_general_dilated(x, kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))

        return run

    for change in (
        lambda w: w * OUTPUTS,
        lambda w: w / jnp.linalg.norm(w.reshape(-1, M), axis=0),
        lambda w: w * lax.rsqrt(jnp.sum(w * w, axis=(0, 1), keepdims=True) + 1e-6),
        lambda w: (w - jnp.mean(w, axis=(0, 1))) / jnp.sqrt(jnp.var(w, axis=(0, 1)) + 1e-5),
        lambda w: w * INPUTS[:5, None],
    ):
        method = pj.lora(rank=2, targets=".*kernel")
        assert_equals_merged(forward(change), params, method, x, tolerance=1e-4)


@pytest.mark.parametrize(
    ("layer", "x", "letters"), [(nn.Dense(M), X, "io"), (nn.Conv(M, (3,)), X[:, :, None], "iio")]
)
def test_normalized_layers_of_flax(layer, x, letters):
    model = nn.WeightNorm(layer)
    params = model.init(KEY, x)["params"]
    method = pj.lora(rank=1, targets=".*kernel", layouts={"kernel": letters})
    assert_equals_merged(lambda p, x: model.apply({"params": p}, x), params, method, x)


def test_bfloat16_products_are_scaled_after_they_are_rounded():
    method = pj.lora(rank=2)
    frozen, trainable = method.init(KEY, held(W))
    run = lambda p, x: (
        x.astype(jnp.bfloat16) @ (p["up"]["kernel"].astype(jnp.bfloat16) * OUTPUTS.astype(jnp.bfloat16))
    )
    got = pj.adapt(run)(method.apply(frozen, trainable), X)
    assert got.dtype == jnp.bfloat16
    assert_close(got, X @ (W * OUTPUTS), 3e-2)


@pytest.mark.parametrize(
    "fn",
    [
        lambda w, x: x @ jnp.tanh(w),
        lambda w, x: x @ (OUTPUTS / w),
        lambda w, x: x @ w * jnp.sum(w * w),
        lambda w, x: x @ (w * w) / jnp.sum(w * w, axis=0),
    ],
)
def test_what_has_no_form_of_its_own_is_still_an_error_that_names_the_operation(fn):
    method = pj.lora(rank=2)
    with pytest.raises(PeftError, match=r"up/kernel: '(tanh|div|mul)' at .*test_adapt_arithmetic"):
        pj.adapt(of(fn))(method.apply(*method.init(KEY, held(W))), X)
