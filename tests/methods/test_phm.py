"""PHM: sums of Kronecker products against NumPy's, of linear layers and convolutions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from support import KEY, all_but_slow, noisy, normal

import peftjax as pj
from peftjax.core import tree
from peftjax.methods.structured._kronecker import Applied, Blocks, Formed
from peftjax.methods.structured.phm_layers import nearest

N, IN, OUT = 3, 6, 9
LINEAR = Blocks(N, 1, IN, False)
RULE, S = normal(KEY, (N, N, N)), normal(jax.random.key(1), (N, IN // N, OUT // N))
X = normal(jax.random.key(2), (4, 5, IN))
PARAMS = {"up": {"kernel": normal(KEY, (IN, OUT))}, "down": {"kernel": normal(KEY, (OUT, IN))}}


def kron(rule, factor):
    return sum(np.kron(a, s) for a, s in zip(np.asarray(rule), np.asarray(factor)))


def test_both_forms_are_the_sum_of_kronecker_products():
    wanted = kron(RULE, S)
    np.testing.assert_allclose(Formed(LINEAR)({"rule": RULE, "factor": S}), wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        Applied(LINEAR)({"rule": RULE, "factor": S}, X), X @ wanted, rtol=1e-4, atol=1e-5
    )
    left, right = normal(KEY, (N, IN // N, 2)), normal(jax.random.key(3), (N, 2, OUT // N))
    thin = {"rule": RULE, "left": left, "right": right}
    wanted = kron(RULE, left @ right)
    np.testing.assert_allclose(Formed(LINEAR)(thin), wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(Applied(LINEAR)(thin, X), X @ wanted, rtol=1e-4, atol=1e-4)
    one = Formed(Blocks(1, 1, IN, False))(
        {"rule": jnp.full((1, 1, 1), 2.0), "factor": normal(KEY, (1, IN, OUT))}
    )
    np.testing.assert_allclose(one, 2.0 * normal(KEY, (1, IN, OUT))[0], rtol=1e-5)


def test_complex_numbers_and_quaternions_are_among_the_algebras():
    # x·W of the row (Re, Im) and a complex w.
    rule = jnp.array([[[1.0, 0], [0, 1]], [[0, 1], [-1, 0]]])
    w = np.array([[0.3 + 0.7j, -1.1 + 0.2j]])
    x = np.array([[1.5 - 0.4j], [0.2 + 2.0j]])
    given = {"rule": rule, "factor": jnp.stack([jnp.asarray(w.real), jnp.asarray(w.imag)])}
    rows = jnp.concatenate([x.real, x.imag], axis=1)
    got = Applied(Blocks(2, 1, 2, False))(given, rows)
    np.testing.assert_allclose(got, np.concatenate([(x @ w).real, (x @ w).imag], axis=1), rtol=1e-5)
    # The product of quaternions, each basis element as the matrix it acts by from the right.
    table = np.zeros((4, 4, 4))
    for p, i, c, sign in [
        (0, 0, 0, 1), (1, 0, 1, 1), (2, 0, 2, 1), (3, 0, 3, 1), (0, 1, 1, 1), (1, 1, 0, -1), (2, 1, 3, -1),
        (3, 1, 2, 1), (0, 2, 2, 1), (1, 2, 3, 1), (2, 2, 0, -1), (3, 2, 1, -1), (0, 3, 3, 1), (1, 3, 2, -1),
        (2, 3, 1, 1), (3, 3, 0, -1),
    ]:  # fmt: skip
        table[i, p, c] = sign
    q, r = np.array([1.0, 2, 3, 4]), np.array([0.5, -1, 2, 0.1])
    given = {"rule": jnp.asarray(table, jnp.float32), "factor": jnp.asarray(r, jnp.float32).reshape(4, 1, 1)}
    got = Applied(Blocks(4, 1, 4, False))(given, jnp.asarray(q, jnp.float32)[None])[0]
    a, b = (q[0], q[1:]), (r[0], r[1:])
    wanted = [a[0] * b[0] - a[1] @ b[1], *(a[0] * b[1] + b[0] * a[1] + np.cross(a[1], b[1]))]
    np.testing.assert_allclose(got, wanted, rtol=1e-5)


CONVOLUTIONS = {
    1: ("NWC", "WIO", "NWC"),
    2: ("NHWC", "HWIO", "NHWC"),
    3: ("NDHWC", "DHWIO", "NDHWC"),
}


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("dimensions", all_but_slow(CONVOLUTIONS, [2]))
def test_a_convolution_is_a_kronecker_sum_at_each_place_of_its_window(dimensions, rank):
    window = (2, 3, 2)[:dimensions]
    params = {"conv": {"kernel": normal(KEY, (*window, IN, OUT))}}
    method = pj.phm(order=N, rank=rank, targets=["conv"], share=False)
    frozen, fresh = method.init(KEY, params)
    trainable = noisy(fresh)
    x = normal(jax.random.key(4), (2, *(5,) * dimensions, IN))

    def forward(params, x):
        steps = (1,) * dimensions
        return lax.conv_general_dilated(
            x, params["conv"]["kernel"], steps, "SAME", dimension_numbers=CONVOLUTIONS[dimensions]
        )

    own = trainable["conv/kernel"]
    factor = own["factor"] if rank is None else own["left"] @ own["right"]
    places = np.asarray(factor).reshape(N, -1, IN // N, OUT // N)
    change = np.stack([kron(own["rule"], places[:, k]) for k in range(places.shape[1])])
    kernel = params["conv"]["kernel"] + change.reshape(*window, IN, OUT)
    got = pj.adapt(forward)(method.apply(frozen, trainable), x)
    np.testing.assert_allclose(got, forward({"conv": {"kernel": kernel}}, x), rtol=1e-3, atol=1e-4)


def test_channels_that_come_first_and_a_window_of_one_place():
    torch_like = {"conv": {"weight": normal(KEY, (OUT, IN, 2, 3))}}
    method = pj.phm(order=N, rank=None, targets=["conv"])
    frozen, fresh = method.init(KEY, torch_like)
    trainable = noisy(fresh)
    change = np.asarray(method.merge(frozen, trainable)["conv"]["weight"] - torch_like["conv"]["weight"])
    places = np.asarray(trainable["conv/weight"]["factor"]).reshape(N, 6, IN // N, OUT // N)
    wanted = [kron(trainable["shared"]["rule"], places[:, k]).T for k in range(6)]
    np.testing.assert_allclose(change, np.stack(wanted, -1).reshape(OUT, IN, 2, 3), rtol=1e-3, atol=1e-5)
    flat = {"conv": {"kernel": normal(KEY, (1, 1, IN, OUT))}}
    made = pj.phm(order=N, targets=["conv"]).init(KEY, flat)[1]
    assert made["conv/kernel"]["left"].shape == (N, IN // N, 1)


def test_the_rule_is_one_for_the_model_and_its_gradient_the_sum_over_its_weights():
    method = pj.phm(order=N)
    frozen, fresh = method.init(KEY, PARAMS)
    trainable = noisy(fresh)

    def loss(params, x=X):
        return jnp.sum(jnp.sin(jnp.tanh(x @ params["up"]["kernel"]) @ params["down"]["kernel"]))

    got = jax.grad(lambda t: pj.adapt(loss)(method.apply(frozen, t)))(trainable)
    grads = jax.grad(loss)(method.merge(frozen, trainable))
    wanted = np.zeros((N, N, N))
    for name in PARAMS:
        own = trainable[f"{name}/kernel"]
        factor, g = np.asarray(own["left"] @ own["right"]), np.asarray(grads[name]["kernel"])
        blocks = g.reshape(N, g.shape[0] // N, N, g.shape[1] // N)
        wanted += np.einsum("pacb,iab->ipc", blocks, factor)
    np.testing.assert_allclose(got["shared"]["rule"], wanted, rtol=1e-3, atol=1e-3)
    assert (
        np.linalg.matrix_rank(method.merge(frozen, trainable)["up"]["kernel"] - PARAMS["up"]["kernel"], 1e-4)
        <= 9
    )


def test_as_many_numbers_are_trained_as_published():
    # Of two projections of Compacter's adapter, 768 to 24 and back, without biases.
    params = {"down": {"kernel": jnp.zeros((768, 24))}, "up": {"kernel": jnp.zeros((24, 768))}}
    _, trainable = jax.eval_shape(pj.phm().init, KEY, params)
    assert tree.count(trainable) == 1584 + 64
    layers = pj.phm_layers(order=4, train_rest=False)
    assert tree.count(jax.eval_shape(layers.init, KEY, params)[1]) == 2 * (64 + 768 * 24 // 4)


def test_layers_start_at_the_nearest_sum_or_with_the_variance_of_glorot():
    exact = jnp.asarray(kron(RULE, S), jnp.float32)
    found = nearest(jnp.stack([exact, exact + 1.0]), LINEAR)
    np.testing.assert_allclose(kron(found["rule"][0], found["factor"][0]), exact, atol=1e-4)
    w = np.asarray(normal(KEY, (IN, OUT)))
    got = nearest(jnp.asarray(w), LINEAR)
    error = np.linalg.norm(kron(got["rule"], got["factor"]) - w)
    sizes = np.linalg.svd(w.reshape(N, 2, N, 3).transpose(0, 2, 1, 3).reshape(9, 6))[1]
    np.testing.assert_allclose(error, np.sqrt(np.sum(sizes[N:] ** 2)), rtol=1e-4)
    big = {"up": {"kernel": jnp.zeros((400, 300))}, "conv": {"kernel": jnp.zeros((3, 3, 40, 60))}}
    method = pj.phm_layers(targets=["up", "conv"])
    merged = method.merge(*method.init(KEY, big))
    np.testing.assert_allclose(np.std(merged["up"]["kernel"]), np.sqrt(2 / 700), rtol=0.15)
    np.testing.assert_allclose(np.std(merged["conv"]["kernel"]), np.sqrt(2 / 900), rtol=0.15)


def test_what_does_not_fit_says_so():
    with pytest.raises(
        pj.PeftError, match="phm: 4 blocks do not divide 'down/kernel', of 9 inputs and 6 outputs"
    ):
        pj.phm().init(KEY, PARAMS)
    with pytest.raises(pj.PeftError, match="phm_layers: order must be positive"):
        pj.phm_layers(order=0)
