"""Riemannian preconditioned LoRA: its gradients against projections, and its steps against PEFT's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import KEY, noisy, normal

import peftjax as pj

PARAMS = {"up": {"kernel": normal(KEY, (12, 8)) / 3}}
X, Y = normal(jax.random.key(1), (20, 12)), normal(jax.random.key(2), (20, 8))
PATH = "up/kernel"


def loss(params):
    return jnp.mean((X @ params["up"]["kernel"] - Y) ** 2)


def started(params=PARAMS, **options):
    method = pj.riemannian_lora(rank=3, alpha=3.0, **options)
    frozen, trainable = method.init(KEY, params)
    return method, frozen, noisy(trainable)


def gradient(method, frozen, trainable):
    return jax.grad(lambda t: pj.adapt(loss)(method.apply(frozen, t)))(trainable)


def updates_of(method, gradients, trainable):
    tx = method.optimizer(optax.sgd(1.0))
    return tx.update(gradients, tx.init(trainable), trainable)[0]


def change(factors, steps):
    """The first-order change of aᵀb."""
    return steps["a"].T @ factors["b"] + factors["a"].T @ steps["b"]


def test_without_damping_the_product_changes_by_two_projections_of_the_whole_gradient():
    method, frozen, trainable = started(damping=1e-9)
    own = trainable[PATH]
    whole = np.asarray(
        jax.grad(lambda w: loss({"up": {"kernel": w}}))(method.merge(frozen, trainable)["up"]["kernel"])
    )
    onto_a, onto_b = (np.linalg.pinv(np.asarray(f)) @ np.asarray(f) for f in (own["a"], own["b"]))
    got = change(own, updates_of(method, gradient(method, frozen, trainable), trainable)[PATH])
    np.testing.assert_allclose(got, -(onto_a @ whole + whole @ onto_b), rtol=1e-3, atol=1e-5)


def test_without_damping_the_change_does_not_depend_on_the_factors():
    method, frozen, trainable = started(damping=1e-9)
    turn = np.asarray(normal(jax.random.key(3), (3, 3))) + 2 * np.eye(3)
    own = trainable[PATH]
    split = {PATH: {"a": jnp.asarray(turn @ own["a"]), "b": jnp.asarray(np.linalg.inv(turn).T @ own["b"])}}
    changes = [
        change(t[PATH], updates_of(method, gradient(method, frozen, t), t)[PATH]) for t in (trainable, split)
    ]
    np.testing.assert_allclose(*changes, rtol=1e-2, atol=1e-4)
    plain = [change(t[PATH], gradient(method, frozen, t)[PATH]) for t in (trainable, split)]
    assert np.abs(plain[0] - plain[1]).max() > 0.1 * np.abs(plain[0]).max()


def test_each_matrix_of_a_stack_has_its_own_and_biases_none():
    params = {"up": {"kernel": jnp.stack([PARAMS["up"]["kernel"]] * 2), "bias": jnp.zeros((2, 8))}}
    method, _, trainable = started(params, bias="adapted")
    gradients = jax.tree.map(jnp.ones_like, trainable)
    got = updates_of(method, gradients, trainable)
    b = np.asarray(trainable[PATH]["b"])[1]
    wanted = -np.linalg.inv(b @ b.T + 0.01 * np.eye(3)) @ np.ones((3, 12))
    np.testing.assert_allclose(got[PATH]["a"][1], wanted, rtol=1e-3)
    np.testing.assert_array_equal(got["up/bias"]["value"], -1.0)


def test_an_update_that_lacks_something_says_so():
    method, frozen, trainable = started()
    gradients = gradient(method, frozen, trainable)
    tx = method.optimizer(optax.sgd(1.0))
    with pytest.raises(pj.PeftError, match="the update needs the factors"):
        tx.update(gradients, tx.init(trainable))
    half = optax.masked(tx, {PATH: {"a": True, "b": False}})
    with pytest.raises(pj.PeftError, match="is given a and not b"):
        half.update(gradients, half.init(trainable), trainable)
    with pytest.raises(pj.PeftError, match="riemannian_lora: damping must be positive"):
        pj.riemannian_lora(damping=0.0)


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_steps_are_those_of_the_optimizer_of_peft(name):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    peft = pytest.importorskip("peft.optimizers", reason="peft is not installed")
    method, frozen, trainable = started()

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lora_A = torch.nn.ModuleDict({"default": torch.nn.Linear(12, 3, bias=False)})
            self.lora_B = torch.nn.ModuleDict({"default": torch.nn.Linear(3, 8, bias=False)})
            with torch.no_grad():
                self.lora_A["default"].weight.copy_(torch.tensor(np.asarray(trainable[PATH]["a"])))
                self.lora_B["default"].weight.copy_(torch.tensor(np.asarray(trainable[PATH]["b"]).T))

        def forward(self, x):
            return x @ base + self.lora_B["default"](self.lora_A["default"](x))

    base = torch.tensor(np.asarray(PARAMS["up"]["kernel"]))
    x, y = (torch.tensor(np.asarray(v)) for v in (X, Y))
    model = torch.nn.Sequential(Layer())
    settings = {"weight_decay": 0.1} if name == "AdamW" else {"momentum": 0.9}
    theirs = peft.create_riemannian_optimizer(model, getattr(torch.optim, name), lr=1e-2, reg=0.1, **settings)
    method, frozen, _ = started(damping=0.1)
    tx = method.optimizer(optax.adamw(1e-2, weight_decay=0.1) if name == "AdamW" else optax.sgd(1e-2, 0.9))
    state = tx.init(trainable)
    for _ in range(5):
        theirs.zero_grad()
        torch.mean((model(x) - y) ** 2).backward()
        theirs.step()
        updates, state = tx.update(gradient(method, frozen, trainable), state, trainable)
        trainable = optax.apply_updates(trainable, updates)
    a, b = (p.detach().numpy() for p in model.parameters())
    np.testing.assert_allclose(trainable[PATH]["a"], a, rtol=2e-4, atol=2e-6)
    np.testing.assert_allclose(trainable[PATH]["b"], b.T, rtol=2e-4, atol=2e-6)
