"""The checks of `peftjax.testing`: what is here passes them, and what is broken does not."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
import pytest
from support import all_but_slow

import peftjax as pj
from peftjax import testing
from peftjax.testing import methods
from peftjax.testing.model import moved
from peftjax.weights.base import Weight
from peftjax.weights.fields import canonical, logical, static, structured
from peftjax.weights.layout import Layout

WEIGHTS = {
    "lora": pj.lora(rank=2),
    "dora": pj.dora(rank=2),
    "snell": pj.snell(rank=2, coefficient=2.0),
    "paca": pj.paca(rank=2),
    "shira": pj.shira(rank=2),
    "galore": pj.galore(rank=2, scale=1.0),
    "lowrank_restarts": pj.lowrank_restarts(rank=2),
}
OPTIMIZERS = {
    "adamw": pj.optim.adamw(1e-2, weight_decay=0.1),
    "adamp": pj.optim.adamp(1e-2),
    "sgdp": pj.optim.sgdp(1e-2),
    "row_adamw": pj.optim.row_adamw(1e-2),
    "eight_bit": pj.optim.eight_bit(optax.adam(1e-2)),
    "nap": pj.optim.normalize_and_project(optax.adam(1e-2)),
    "galore": pj.optim.galore(1e-2, rank=2),
    "natural_galore": pj.optim.natural_galore(1e-2, rank=2, history=3),
}


@pytest.mark.parametrize("name", all_but_slow(WEIGHTS, ("lora",)))
def test_a_weight_of_each_kind_is_usable_as_its_array(name):
    model = testing.small_model()
    frozen, trainable = methods.begun(WEIGHTS[name], model.params)
    params = WEIGHTS[name].apply(frozen, moved(trainable))
    weight = params["down"]["kernel"]
    assert isinstance(weight, Weight)
    # A kernel's distance is steep where two columns meet.
    testing.check_weight(weight, tolerance=1e-3 if name == "snell" else 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_stands_where_one_of_optax_does(name):
    testing.check_optimizer(OPTIMIZERS[name])


@structured
class Doubled(Weight):
    """Twice its base, or by mistake not."""

    base: jax.Array = logical()
    factor: jax.Array = canonical()
    layout: Layout = static()

    def dense(self):
        return self.factor * self.base

    def dot(self, x, rule):
        return rule(x, self.base)


def test_a_weight_whose_product_is_not_that_of_its_array_is_found():
    weight = Doubled(jnp.ones((3, 4)), jnp.full((), 2.0), Layout.parse("io", (3, 4)))
    with pytest.raises(AssertionError, match="x @ w"):
        testing.check_weight(weight)


def test_an_optimizer_whose_state_changes_its_type_is_found():
    def update(grads, state, params=None):
        return jax.tree.map(lambda g: -0.1 * g, grads), state.astype(jnp.float32)

    tx = optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update)
    with pytest.raises(AssertionError, match="state is another after step 1"):
        testing.check_optimizer(tx)


def test_a_method_is_checked_whole():
    testing.check_method(pj.lora(rank=2))


def test_a_method_that_hides_what_it_changes_is_found():
    method = pj.galore(rank=2, scale=1.0, targets=["up"], train_rest=False)
    hidden = tuple(dataclasses.replace(one, changes=("p",)) for one in method.advances)
    case = methods.case_of(dataclasses.replace(method, advances=hidden), testing.small_model())
    with pytest.raises(AssertionError, match=r"an advance changes .*'weight'.*, and does not say so"):
        methods.an_advance_changes_of_the_state_what_it_says(case)


def test_a_method_that_trains_what_has_no_gradient_is_found():
    lora = pj.lora(rank=2, targets=["up"])

    def init(key, params):
        frozen, trainable = lora.init(key, params)
        return frozen, {path: {**slots, "idle": jnp.ones(2)} for path, slots in trainable.items()}

    case = methods.case_of(dataclasses.replace(lora, init=init), testing.small_model(), compiled=False)
    with pytest.raises(AssertionError, match="idle"):
        methods.every_trained_leaf_gets_a_finite_gradient_that_is_not_zero(case)


@pytest.mark.slow
def test_a_start_that_is_not_said_to_be_another_is_found():
    case = methods.case_of(pj.snell(rank=2, coefficient=2.0), testing.small_model(), compiled=False)
    with pytest.raises(AssertionError, match="a fresh adapter moves the outputs"):
        methods.a_fresh_adapter_leaves_the_outputs_as_they_were(case)
