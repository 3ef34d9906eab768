"""LoRA-FA's second version: the gradient of b is that of the nearest product to the whole gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import normal

import peftjax as pj

KEY = jax.random.key(0)
PARAMS = {"up": {"kernel": normal(KEY, (12, 8)) / 3}}
X, Y = normal(jax.random.key(1), (20, 12)), normal(jax.random.key(2), (20, 8))
PATH = "up/kernel"


def loss(params):
    return jnp.mean((X @ params["up"]["kernel"] - Y) ** 2)


def started(**options):
    method = pj.lora_fa(rank=3, alpha=6.0, **options)
    return (method, *method.init(KEY, PARAMS))


def gradient(method, frozen, trainable):
    return jax.grad(lambda t: pj.adapt(loss)(method.apply(frozen, t)))(trainable)[PATH]["b"]


def test_a_step_is_the_nearest_to_the_whole_gradient():
    method, frozen, trainable = started(nearest_gradient=True)
    whole = jax.grad(loss)(PARAMS)["up"]["kernel"]
    a, scale = frozen.state[PATH]["a"], frozen.plan[0].scale
    nearest = jnp.linalg.lstsq(scale * a.T, whole)[0]  # the least of ‖G - s aᵀ·δb‖
    np.testing.assert_allclose(gradient(method, frozen, trainable), nearest, rtol=1e-4, atol=1e-6)
    own = gradient(*started())
    assert np.abs(own - nearest).max() > 0.1 * np.abs(nearest).max()


def test_only_the_gradient_differs():
    plain, second = started(), started(nearest_gradient=True)
    trainable = jax.tree.map(lambda b: b + 0.1, plain[2])
    dense = [method.merge(frozen, trainable)["up"]["kernel"] for method, frozen, _ in (plain, second)]
    np.testing.assert_array_equal(*dense)
    assert jax.tree.structure(plain[2]) == jax.tree.structure(second[2])


@pytest.mark.parity
def test_steps_are_those_of_the_optimizer_of_peft(monkeypatch):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    lorafa = pytest.importorskip("peft.optimizers.lorafa", reason="peft is not installed")
    monkeypatch.setattr(lorafa, "is_bf16_available", lambda: False)  # else its product is rounded
    method, frozen, trainable = started(nearest_gradient=True)
    scale = frozen.plan[0].scale
    # Its b is [out, r], and is not zero, so that the weight decay is seen.
    trainable = jax.tree.map(lambda b: b + 0.1, trainable)
    a = torch.tensor(np.asarray(frozen.state[PATH]["a"]))
    b = torch.tensor(np.asarray(trainable[PATH]["b"]).T.copy(), requires_grad=True)
    names = ["lora_A.weight", "lora_B.weight"]
    group = {"params": [a, b], "names": names, "scaling_factors": [scale] * 2}
    theirs = lorafa.LoraFAOptimizer([group], lr=1e-2, weight_decay=0.1)
    ours = optax.chain(
        pj.optim.scale_by_released_adam(0.9, 0.999, 1e-6),
        optax.scale_by_learning_rate(1e-2),
        pj.optim.decay_updated_weights(1e-2, 0.1),
    )
    state = ours.init(trainable)
    x, y = (torch.tensor(np.asarray(v)) for v in (X, Y))
    base = torch.tensor(np.asarray(PARAMS["up"]["kernel"]))
    for _ in range(5):
        theirs.zero_grad()
        torch.mean((x @ base + scale * (x @ a.T) @ b.T - y) ** 2).backward()
        theirs.step()
        grads = {PATH: {"b": gradient(method, frozen, trainable)}}
        updates, state = ours.update(grads, state, trainable)
        trainable = optax.apply_updates(trainable, updates)
    np.testing.assert_allclose(trainable[PATH]["b"], b.detach().numpy().T, rtol=2e-4, atol=2e-6)
