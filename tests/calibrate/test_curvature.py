"""Curvature factors against explicit activations and gradients, and the edit against its formula in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import KEY, normal

import peftjax as pj

PARAMS = {
    "up": {"kernel": normal(KEY, (5, 4))},
    "layers": {"kernel": normal(jax.random.key(1), (3, 4, 4))},
    "down": {"kernel": normal(jax.random.key(2), (4, 3))},
}
BATCHES = [
    (normal(jax.random.key(n), (2, 6, 5)), jnp.asarray(np.arange(12).reshape(2, 6) % n > 0)) for n in (3, 4)
]


def loss(params, batch, probes=None):
    """With probes, zeros that are added to the result of each layer."""
    x, mask = batch
    probes = probes or {"up": 0.0, "layers": jnp.zeros((3, 1, 1, 1)), "down": 0.0}
    h = jnp.tanh(x @ params["up"]["kernel"] + probes["up"])

    def layer(h, own):
        kernel, probe = own
        return jnp.tanh(h @ kernel + probe), h

    h, entered = jax.lax.scan(layer, h, (params["layers"]["kernel"], probes["layers"]))
    y = h @ params["down"]["kernel"] + probes["down"]
    return jnp.sum(jnp.sin(y).sum(-1) * mask), {"up": x, "layers": entered, "down": h}


def factors(**options):
    return pj.calibrate.curvature_factors(
        lambda params, batch: loss(params, batch)[0], PARAMS, BATCHES, mask=lambda batch: batch[1], **options
    )


def moments():
    """A and G of each layer, from what enters it and from the gradients of probes behind it."""
    found = {}
    for name in PARAMS:
        inputs, gradients = [], []
        for x, mask in BATCHES:
            stack = (3,) if name == "layers" else ()
            shapes = {"up": (2, 6, 4), "layers": (3, 2, 6, 4), "down": (2, 6, 3)}
            probes = {key: jnp.zeros(shape) for key, shape in shapes.items()}
            probed = jax.grad(lambda probes, x=x, mask=mask: loss(PARAMS, (x, mask), probes)[0])(probes)[name]
            entered = loss(PARAMS, (x, mask))[1][name]
            for rows, values in ((inputs, entered), (gradients, probed)):
                counted = np.asarray(values)[..., np.asarray(mask), :]
                rows.append(counted.reshape(*stack, -1, values.shape[-1]))
        found[f"{name}/kernel"] = [
            np.einsum("...ni,...nj->...ij", rows, rows) / rows.shape[-2]
            for rows in (np.concatenate(parts, axis=-2) for parts in (inputs, gradients))
        ]
    return found


def edited(w, a, g, keep):
    """The edit of one matrix, entry by entry."""
    (rows, u), (columns, v) = np.linalg.eigh(a.astype(np.float64)), np.linalg.eigh(g.astype(np.float64))
    places = np.ndindex(len(rows), len(columns))
    sizes = sorted(((rows[i] * columns[j], i, j) for i, j in places), reverse=True)
    new, held, total = np.zeros_like(w), 0.0, sum(size for size, _, _ in sizes)
    count = 0
    for size, i, j in sizes:
        if held >= keep * total:
            break
        new, held, count = new + (u[:, i] @ w @ v[:, j]) * np.outer(u[:, i], v[:, j]), held + size, count + 1
    return new, count / w.size


def test_they_are_the_moments_of_inputs_and_of_gradients():
    found = factors()
    for path, (a, g) in moments().items():
        np.testing.assert_allclose(found.inputs[path], a, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found.outputs[path], g, rtol=1e-4, atol=1e-6)


def test_the_edit_keeps_the_largest_products():
    found = factors()
    result = pj.calibrate.keep_curvature(PARAMS, found, keep=0.7)
    for name, own in PARAMS.items():
        path, w = f"{name}/kernel", np.asarray(own["kernel"])
        for at in np.ndindex(w.shape[:-2]):
            a, g = np.asarray(found.inputs[path])[at], np.asarray(found.outputs[path])[at]
            wanted, share = edited(w[at], a, g, 0.7)
            np.testing.assert_allclose(result.params[name]["kernel"][at], wanted, atol=1e-5)
            assert result.kept[path][at] == share < 1.0


def test_more_is_kept_of_more_and_all_is_the_model():
    found = factors(targets=["down"])
    whole = pj.calibrate.keep_curvature(PARAMS, found, keep=1.0)
    np.testing.assert_array_equal(whole.params["down"]["kernel"], PARAMS["down"]["kernel"])
    shares = [pj.calibrate.keep_curvature(PARAMS, found, keep=k).kept["down/kernel"] for k in (0.2, 0.6, 0.9)]
    assert 0 < shares[0] <= shares[1] <= shares[2] < 1
    assert shares[0] < shares[2]
    flat = pj.calibrate.CurvatureFactors({"down/kernel": jnp.eye(4)}, {"down/kernel": jnp.eye(3)})
    assert pj.calibrate.keep_curvature(PARAMS, flat, keep=0.5).kept["down/kernel"] == 0.5


def test_what_does_not_fit_is_named():
    keep = pj.calibrate.keep_curvature
    found = factors(targets=["down"])
    with pytest.raises(pj.PeftError, match=r"keep must be in \(0, 1\], got 0"):
        keep(PARAMS, found, keep=0.0)
    with pytest.raises(pj.PeftError, match="'down/kernel' is no array here"):
        keep({"up": PARAMS["up"]}, found)
    with pytest.raises(pj.PeftError, match="of 4 inputs and 3 outputs, the weight is a matrix of 3 x 4"):
        keep({"down": {"kernel": PARAMS["down"]["kernel"].T}}, found)
    with pytest.raises(pj.PeftError, match="no row of 'up/kernel' reaches the loss"):
        pj.calibrate.curvature_factors(lambda params, x: jnp.sum(x), PARAMS, [BATCHES[0][0]], targets=["up"])


# A classifier that has learned a rule of 8 directions, and 12 rows by heart.


def planted():
    """A model, and `(rows, classes)`: general ones, others held out, and those learned by heart."""
    rng = np.random.default_rng(0)
    n, inner, classes = 24, 48, 6
    teacher = rng.standard_normal((8, classes))
    basis = np.linalg.qr(rng.standard_normal((n, 8)))[0].T

    def drawn(seed):
        own = np.random.default_rng(seed)
        z = own.standard_normal((600, 8))
        x = z @ basis + 0.05 * own.standard_normal((600, n))
        return jnp.asarray(x, jnp.float32), jnp.asarray(np.argmax(z @ teacher, -1))

    general, held = drawn(1), drawn(2)
    x, labels = rng.standard_normal((12, n)) / 1.7, rng.integers(0, classes, 12)
    by_heart = jnp.asarray(x, jnp.float32), jnp.asarray(labels)
    params = {
        "up": {"kernel": normal(KEY, (n, inner)) / n**0.5},
        "down": {"kernel": normal(jax.random.key(1), (inner, classes)) / inner**0.5},
    }
    both = tuple(jnp.concatenate([g, jnp.repeat(p, 10, 0)]) for g, p in zip(general, by_heart))
    tx = optax.adam(1e-2)

    @jax.jit
    def train(params, state):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(classified)(params, both), state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), None, 300)[0][0]

    return train(params, tx.init(params)), general, held, by_heart


def logits(params, x):
    return jax.nn.gelu(x @ params["up"]["kernel"]) @ params["down"]["kernel"]


def classified(params, batch):
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits(params, batch[0]), batch[1]))


def right(params, batch):
    return float((logits(params, batch[0]).argmax(-1) == batch[1]).mean())


def cut(w, size):
    """The weight without its smallest singular values, and without its smallest numbers, changed as much."""
    u, sizes, vt = np.linalg.svd(np.asarray(w), full_matrices=False)
    lost = np.append(np.sqrt(np.cumsum(sizes[::-1] ** 2))[::-1], 0.0)
    rank = int(np.argmin(np.abs(lost - size)))
    order = np.argsort(np.abs(np.asarray(w)), axis=None)
    lost = np.append(0.0, np.sqrt(np.cumsum(np.asarray(w).ravel()[order] ** 2)))
    sparse = np.array(w)
    sparse.reshape(-1)[order[: int(np.argmin(np.abs(lost - size)))]] = 0.0
    return (u[:, :rank] * sizes[:rank]) @ vt[:rank], sparse


@pytest.mark.slow
def test_what_was_learned_by_heart_is_forgotten_and_the_rule_is_not():
    params, general, held, by_heart = planted()
    found = pj.calibrate.curvature_factors(classified, params, [general])
    edited = pj.calibrate.keep_curvature(params, found, keep=0.95).params
    assert right(params, by_heart) == 1.0
    assert right(edited, by_heart) <= 0.5
    assert right(edited, held) >= right(params, held) - 0.02
    for number in (0, 1):
        other = {}
        for name, own in params.items():
            size = float(jnp.linalg.norm(edited[name]["kernel"] - own["kernel"]))
            other[name] = {"kernel": cut(own["kernel"], size)[number]}
        assert right(other, held) < right(edited, held) - 0.1
