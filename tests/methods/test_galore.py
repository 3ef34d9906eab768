"""GaLore against its definition: dense gradients, their SVD, an optimizer on the projection."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pretraining
import pytest
from pretraining import advanced, merged, resting
from support import KEY, assert_close, assert_no_dense_gradient, normal, quick_at

import peftjax as pj
from peftjax.core import tree
from peftjax.core.errors import PeftError
from peftjax.planner.residuals import kept_arrays

RANK, EVERY, RATE, DECAY = 2, 3, 1e-2, 0.1
PARAMS = {
    "up": {"kernel": normal(KEY, (6, 10)), "bias": jnp.zeros(10)},
    "blocks": {"down": {"kernel": normal(jax.random.key(1), (2, 10, 10)) / 3}},
    "down": {"kernel": normal(jax.random.key(2), (10, 4))},
}
BATCHES = [normal(jax.random.key(10 + n), (5, 6)) for n in range(8)]


def forward(params, x):
    h = jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"])
    h = jax.lax.scan(lambda h, w: (h + jnp.tanh(h @ w), None), h, params["blocks"]["down"]["kernel"])[0]
    return h @ params["down"]["kernel"]


def loss_of(params, batch):
    return jnp.mean(jnp.square(pj.adapt(forward)(params, batch) - jnp.sin(3.0 * batch[:, :4])))


def started(method, tx, params=PARAMS):
    return pretraining.started(method, tx, params, loss=loss_of)


def trained(method, tx, batches=BATCHES, params=PARAMS):
    """The merged weights after each step, and the last state."""
    (run, state), weights = started(method, tx, params), []
    for batch in batches:
        state, _ = run.step(state, batch)
        weights.append(merged(run, state))
    return weights, state


def defined(tx, *, rank=RANK, scale=0.25, decay=0.0, batches=BATCHES, params=PARAMS):
    """The same from dense gradients, matrix by matrix; `tx` without decay, which is that of AdamW."""

    def rows_first(g):  # the compressed side first
        return g if g.shape[-2] <= g.shape[-1] else g.swapaxes(-1, -2)

    @jax.jit
    def step(params, projectors, state, batch, refresh):
        grads = tree.named_leaves(jax.grad(loss_of)(params, batch))
        leaves = tree.named_leaves(params)
        for path, g in grads.items():
            if g.ndim > 1:
                u = jnp.linalg.svd(rows_first(g), full_matrices=False)[0]
                new = u[..., :rank].swapaxes(-1, -2)
                # The sign of a singular vector is arbitrary; kept moments depend on it.
                largest = jnp.take_along_axis(new, jnp.argmax(jnp.abs(new), -1, keepdims=True), -1)
                new = new * jnp.sign(largest)
                projectors = {**projectors, path: jnp.where(refresh, new, projectors[path])}
        thin = {p: projectors[p] @ rows_first(g) if p in projectors else g for p, g in grads.items()}
        updates, state = tx.update(thin, state, thin)
        for path, u in updates.items():
            if path in projectors:
                u = scale * projectors[path].swapaxes(-1, -2) @ u
                u = u if u.shape == leaves[path].shape else u.swapaxes(-1, -2)
            leaves[path] = leaves[path] * (1.0 - RATE * decay) + u
        return tree.replace(params, leaves), projectors, state

    leaves = tree.named_leaves(params)
    sides = {path: sorted(w.shape[-2:]) for path, w in leaves.items() if w.ndim > 1}
    projectors = {path: jnp.zeros((*leaves[path].shape[:-2], rank, low)) for path, (low, _) in sides.items()}
    shapes = {path: (*leaves[path].shape[:-2], rank, high) for path, (_, high) in sides.items()}
    state = tx.init({path: jnp.zeros(shapes.get(path, leaf.shape)) for path, leaf in leaves.items()})
    weights = []
    for number, batch in enumerate(batches):
        params, projectors, state = step(params, projectors, state, batch, number % EVERY == 0)
        weights.append(params)
    return weights


def galore(**options):
    return pj.galore(**{"rank": RANK, "every": EVERY, "basis": "svd", **options})


@pytest.mark.slow
@pytest.mark.parametrize("basis", ["svd", "gram", "subspace"])
def test_it_follows_the_definition_through_refreshes(basis):
    weights, _ = trained(galore(basis=basis, iterations=8), optax.adam(RATE))
    for got, want in zip(weights, defined(optax.adam(RATE))):
        assert_close(got, want, 2e-4)


OTHERS = {
    "momentum": optax.sgd(RATE, momentum=0.9),
    "lion": optax.lion(RATE / 10, weight_decay=0.0),
    "adafactor": optax.adafactor(RATE, min_dim_size_to_factor=2, multiply_by_parameter_scale=False),
}


@pytest.mark.parametrize("inner", quick_at(OTHERS.values(), 0), ids=OTHERS)
def test_with_other_optimizers_inside(inner):
    assert_close(trained(galore(), inner)[0][-1], defined(inner)[-1], 1e-4)


@pytest.mark.slow
def test_decoupled_weight_decay_is_that_of_the_whole_weight():
    weights, _ = trained(galore(), optax.adamw(RATE, weight_decay=DECAY))
    wanted = defined(optax.adam(RATE), decay=DECAY)
    for got, want in zip(weights, wanted):
        assert_close(got, want, 1e-4)
    without = defined(optax.adam(RATE))[-1]["up"]["kernel"]
    assert float(jnp.abs(wanted[-1]["up"]["kernel"] - without).max()) > 1e-3


@pytest.mark.slow
def test_at_full_rank_sgd_is_that_of_the_dense_weight_and_adam_is_not():
    full = {"rank": 4, "rank_pattern": {"up": 6, "blocks/down": 10}, "scale": 1.0, "every": 100}
    got = trained(galore(**full), optax.sgd(RATE))[0][-1]
    assert_close(got, trained(pj.full(), optax.sgd(RATE))[0][-1], 1e-5)
    projected, dense = (trained(m, optax.adam(RATE))[0][-1] for m in (galore(**full), pj.full()))
    assert float(jnp.abs(projected["up"]["kernel"] - dense["up"]["kernel"]).max()) > 1e-2


def test_no_step_makes_an_array_of_the_weights_size():
    for side in ("input", "output", "both"):
        method = galore(side=side)
        assert_no_dense_gradient(forward, PARAMS, method, BATCHES[0])


def gradients_made_by_a_refresh(basis):
    """The shapes of products in the scanned layers that have the gradient's accumulator beside them."""
    method = galore(basis=basis, targets=["blocks/down"], train_rest=False, rank=4)
    frozen, trainable = method.init(KEY, PARAMS)

    def run(trainable):
        loss, tx = (lambda params: loss_of(params, BATCHES[0])), method.optimizer(optax.sgd(1.0))
        return method.advance(loss, frozen, trainable, tx.init(trainable), step=0, key=KEY, tx=tx)[0]

    scans = [e for e in jax.make_jaxpr(run)(trainable).jaxpr.eqns if e.primitive.name == "scan"]
    return [var.aval.shape for e in scans for var in e.outvars if e.params["reverse"]]


def test_a_refresh_by_subspace_iteration_forms_no_gradient_of_a_weight(monkeypatch):
    monkeypatch.setattr("peftjax.methods.projected._refresh.OVERSAMPLING", 1)
    assert (2, 10, 10) in gradients_made_by_a_refresh("svd")
    shapes = gradients_made_by_a_refresh("subspace")
    assert shapes
    assert (2, 10, 10) not in shapes


@pytest.mark.parametrize(("side", "kept"), [("input", (5, RANK)), ("output", (5, 6))])
def test_backward_keeps_the_projected_input_or_on_an_output_side_the_input(side, kept):
    method = galore(side=side, targets=["up"], train_rest=False)
    frozen, trainable = method.init(KEY, PARAMS)
    frozen = replace(frozen, advanced=True)

    def out(trainable, frozen, x):
        params = method.apply(frozen, trainable)
        return pj.adapt(lambda params, x: (x * 2.0) @ params["up"]["kernel"])(params, x)

    shapes = [array.shape for array in kept_arrays(out, trainable, frozen, BATCHES[0])]
    assert kept in shapes
    assert ((5, 6) in shapes) == (side == "output")


def test_both_sides_are_two_projections():
    method = galore(side="both", targets=["up"], train_rest=False, scale=1.0)
    weights, _ = trained(method, optax.sgd(1.0), BATCHES[:1])
    g = jax.grad(loss_of)(PARAMS, BATCHES[0])["up"]["kernel"]
    u, s, vh = np.linalg.svd(np.asarray(g), full_matrices=False)
    best = (u[:, :RANK] * s[:RANK]) @ vh[:RANK]
    change = weights[0]["up"]["kernel"] - PARAMS["up"]["kernel"]
    assert_close(-change, best, 1e-5)


def test_an_update_has_rank_r_between_refreshes_and_more_across_them():
    weights, _ = trained(galore(targets=["up"], train_rest=False), optax.adam(RATE))
    start = PARAMS["up"]["kernel"]

    def rank(number):
        return int(jnp.linalg.matrix_rank(weights[number]["up"]["kernel"] - start, rtol=1e-4))

    assert rank(EVERY - 1) == RANK
    assert rank(len(BATCHES) - 1) > RANK + 2


@pytest.mark.slow
def test_parameters_that_are_iterated_on_one_after_the_other_get_the_same_bases():
    found = []
    for together in (None, 1):
        run, state = started(galore(basis="subspace", together=together), optax.sgd(1.0))
        state = advanced(run, state, 0, BATCHES[0])
        found.append((state.frozen.state, state.trainable))
    assert_close(found[1], found[0], 1e-5)


@pytest.mark.slow
def test_weights_do_not_change_at_a_refresh():
    run, state = started(galore(basis="subspace"), optax.adamw(RATE, weight_decay=DECAY))
    for batch in BATCHES[:5]:
        state, _ = run.step(state, batch)
    refreshed = advanced(run, state, 6, BATCHES[5])
    assert_close(merged(run, refreshed), merged(run, state), 1e-6)
    for path, held in refreshed.frozen.state.items():
        assert float(jnp.abs(state.trainable[path]["z"]).max()) > 1e-3
        assert float(jnp.abs(refreshed.trainable[path]["z"]).max()) == 0.0, path
        if "p" in held:
            gram = jnp.einsum("...rn,...qn->...rq", held["p"], held["p"])
            assert_close(gram, jnp.broadcast_to(jnp.eye(RANK), gram.shape), 1e-5)
            assert float(jnp.abs(held["p"] - state.frozen.state[path]["p"]).max()) > 1e-3


def moments_after(moments):
    """What turns the old basis into the new one, and the first and second moments before and after."""
    method = galore(moments=moments, targets=["up"], train_rest=False)
    run, state = started(method, optax.adam(RATE))
    for batch in BATCHES[:2]:
        state, _ = run.step(state, batch)
    refreshed = advanced(run, state, EVERY, BATCHES[2])
    new, old = (here.frozen.state["up/kernel"]["p"] for here in (refreshed, state))
    return new @ old.T, *(adam_of(here.opt_state) for here in (state, refreshed))


def adam_of(opt_state):
    state = opt_state.optimizer[0]
    return [part["up/kernel"]["z"] for part in (state.mu, state.nu)]


@pytest.mark.slow
def test_what_a_refresh_does_to_the_moments():
    turn, before, after = moments_after("keep")
    assert_close(after, before, 0.0)
    turn, before, after = moments_after("rotate")
    assert_close(after, [turn @ before[0], jnp.square(turn) @ before[1]], 1e-6)
    _, _, after = moments_after("reset")
    assert all(float(jnp.abs(part).max()) == 0.0 for part in after)


def test_rotation_refuses_a_state_it_does_not_know():
    method = galore(moments="rotate")
    with pytest.raises(PeftError, match=r"moments='rotate': how 'v_row' of '.*kernel' turns"):
        trained(method, optax.adafactor(RATE, min_dim_size_to_factor=2), BATCHES[:1])


@pytest.mark.slow
@pytest.mark.parametrize("moments", ["keep", "reset", "rotate"])
@pytest.mark.parametrize("side", ["smaller", "both"])
def test_a_refresh_in_the_middle_of_a_window_turns_the_sum_into_the_new_basis(moments, side):
    method = pj.galore(rank=2, every=EVERY, side=side, moments=moments, train_rest=False)
    run, state = started(method, optax.MultiSteps(optax.adam(RATE), 2).gradient_transformation())
    state, _ = resting(run).step(state, BATCHES[0])
    refreshed = advanced(run, state, EVERY, BATCHES[1])
    before, now = (s.opt_state.optimizer.acc_grads["up/kernel"]["z"] for s in (state, refreshed))
    old, new = (s.frozen.state["up/kernel"] for s in (state, refreshed))
    wanted = new["p"] @ old["p"].T @ before
    if side == "both":
        wanted = wanted @ old["q"] @ new["q"].T
    assert_close(now, wanted, 1e-5)
    assert float(jnp.abs(before - now).max()) > 1e-3 < float(jnp.abs(now).max())


@pytest.mark.slow
def test_accumulated_gradients_are_those_of_the_whole_batch():
    method = galore(every=100)
    halves = [half for batch in BATCHES[:3] for half in (batch, batch)]
    many, _ = trained(method, optax.MultiSteps(optax.adam(RATE), 2).gradient_transformation(), halves)
    once, _ = trained(method, optax.adam(RATE), BATCHES[:3])
    assert_close(many[-1], once[-1], 1e-5)


@pytest.mark.slow
def test_clipping_is_that_of_the_projected_gradients():
    method = galore(train_rest=False, scale=0.5)
    tx = optax.chain(optax.clip_by_global_norm(1e-3), optax.sgd(1.0))
    weights, state = trained(method, tx, BATCHES[:1])
    norm = optax.tree.norm({path: slots["z"] for path, slots in state.trainable.items()})
    assert float(norm) == pytest.approx(1e-3, rel=1e-4)
    change = jax.tree.map(jnp.subtract, weights[0], PARAMS)
    assert float(optax.tree.norm(change)) == pytest.approx(0.5e-3, rel=1e-2)


def test_bfloat16_weights_lose_no_step_to_rounding():
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), PARAMS)
    method = galore(targets=["up"], train_rest=False, every=100)
    _, state = trained(method, optax.sgd(1e-5), BATCHES, half)
    weight = state.frozen.state["up/kernel"]["weight"]
    assert weight.dtype == jnp.bfloat16
    assert np.array_equal(weight, half["up"]["kernel"])
    assert float(jnp.abs(state.trainable["up/kernel"]["z"]).max()) > 0.0


@pytest.mark.slow
def test_in_a_chain_it_renews_with_the_other_methods_in_place():
    method = pj.chain(pj.lora(targets=["up"], rank=2), galore(targets=["blocks/down"], train_rest=False))
    weights, state = trained(method, optax.adam(RATE), BATCHES[:4])
    assert set(state.trainable) == set(state.frozen.state) == {"lora", "galore"}
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(weights[-1]))
    alone = galore(targets=["blocks/down"], train_rest=False)
    alone = pj.training(alone, loss_of, optax.adam(RATE))
    state = alone.begin(*alone.method.init(jax.random.split(KEY, 2)[1], PARAMS), KEY)
    wanted = advanced(alone, state, 0, BATCHES[0]).frozen.state["blocks/down/kernel"]
    run, both = started(method, optax.adam(RATE))
    found = advanced(run, both, 0, BATCHES[0]).frozen.state["galore"]["blocks/down/kernel"]
    assert_close(found["p"], wanted["p"], 1e-5)


@pytest.mark.slow
def test_a_sharded_run_is_that_of_one_device():
    from jax.sharding import NamedSharding, PartitionSpec

    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    wide = {**PARAMS, "up": {"kernel": PARAMS["up"]["kernel"], "bias": PARAMS["up"]["bias"]}}
    columns = NamedSharding(mesh, PartitionSpec(None, "tensor"))
    sharded = {**wide, "up": {**wide["up"], "kernel": jax.device_put(wide["up"]["kernel"], columns)}}
    rows = NamedSharding(mesh, PartitionSpec("data"))
    batches = [jax.device_put(jnp.concatenate([b, b])[:8], rows) for b in BATCHES[:5]]
    method = galore(basis="subspace")
    got, _ = trained(method, optax.adam(RATE), batches, sharded)
    want, _ = trained(method, optax.adam(RATE), [np.asarray(b) for b in batches], wide)
    assert_close(got[-1], want[-1], 1e-4)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"every": 0}, "galore: every must be positive, got 0"),
        ({"scale": 0.0}, "galore: scale must be positive"),
        ({"side": "left"}, "galore: side must be one of smaller, larger, input, output, both, got 'left'"),
        ({"basis": "qr"}, "galore: basis must be one of"),
        ({"together": 0}, "galore: together must be positive, got 0"),
        ({"iterations": -1}, "galore: iterations must be 0 or more"),
        ({"dtype": "int8"}, "galore: dtype must be one of float32, bfloat16"),
    ],
)
def test_an_option_out_of_range_is_an_error(options, sentence):
    with pytest.raises(PeftError, match=sentence):
        pj.galore(**options)
