"""PockEngine's cut: where the backward pass ends, what it keeps, and how many layers a budget allows."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import KEY, noisy
from tiny_models import BLOCKS, tiny

import peftjax as pj
from peftjax.core import compat
from peftjax.core.errors import PeftError
from peftjax.planner.residuals import kept_arrays, nbytes
from peftjax.planner.search import largest

BATCH = {"input_ids": jnp.arange(10).reshape(2, 5) % 7}


def backbone(blocks):
    """The tiny decoder with so many blocks."""
    model = tiny("backbone")
    params = {**model.params, "blocks": jax.tree.map(lambda w: w[:blocks], model.params["blocks"])}
    return dataclasses.replace(model.forward, num_layers=blocks), params


def cut_at(layers, blocks, *, cut=True):
    """A LoRA of the last layers, with the cut or without."""
    lora = pj.lora(
        rank=2, targets=["attention/output", "feed_forward/down"], layers=range(blocks - layers, blocks)
    )
    return pj.chain(pj.pockengine(layers=layers), lora) if cut else lora


def loss_of(method, model, frozen):
    run = pj.adapt(method.model(model))
    return lambda trainable, batch: jnp.mean(jnp.sin(run(method.apply(frozen, trainable), batch)))


def kept(layers, blocks, *, cut=True):
    model, params = backbone(blocks)
    method = cut_at(layers, blocks, cut=cut)
    frozen, trainable = method.init(KEY, params)
    return nbytes(kept_arrays(loss_of(method, model, frozen), trainable, BATCH))


def products(layers, blocks, *, cut=True):
    """How many products the forward and the backward pass have, a scan's as often as it runs."""
    model, params = backbone(blocks)
    method = cut_at(layers, blocks, cut=cut)
    frozen, trainable = method.init(KEY, params)

    def count(jaxpr, times=1):
        total = 0
        for eqn in jaxpr.eqns:
            total += times * (eqn.primitive.name == "dot_general")
            inner = times * (eqn.params["length"] if eqn.primitive.name == "scan" else 1)
            for value in eqn.params.values():
                for one in value if isinstance(value, tuple | list) else (value,):
                    if hasattr(one, "eqns") or hasattr(one, "jaxpr"):
                        total += count(compat.open_jaxpr(one)[0] if hasattr(one, "jaxpr") else one, inner)
        return total

    loss = loss_of(method, model, frozen)
    both = count(compat.open_jaxpr(jax.make_jaxpr(jax.grad(loss))(trainable, BATCH))[0])
    return both, count(compat.open_jaxpr(jax.make_jaxpr(loss)(trainable, BATCH))[0])


def test_what_is_kept_grows_with_the_layers_below_by_the_adapters_zeros_alone():
    factors = 4 * 2 * ((8 + 8) + (12 + 8))  # of the adapter in a layer, which a scan takes of all layers
    assert kept(2, 6) - kept(2, 3) == 3 * factors


def test_no_layer_below_has_a_product_in_the_backward_pass():
    backward = [both - forward for both, forward in (products(2, 3), products(2, 6))]
    assert backward[0] == backward[1]
    whole, forward = products(2, 6, cut=False)
    assert whole - forward > 2 * backward[0]


def test_gradients_and_outputs_are_those_without_the_cut():
    model, params = backbone(4)
    found = []
    for cut in (True, False):
        method = cut_at(2, 4, cut=cut)
        frozen, fresh = method.init(KEY, params)
        own = noisy(cut_at(2, 4, cut=False).init(KEY, params)[1])
        loss = loss_of(method, model, frozen)
        trainable = {**fresh, "lora": own} if cut else own
        value, gradient = jax.jit(jax.value_and_grad(loss))(trainable, BATCH)
        found.append((value, gradient["lora"] if cut else gradient))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), *found)


@pytest.mark.slow
def test_the_number_of_layers_that_a_budget_of_bytes_allows():
    model, params = backbone(BLOCKS)

    @functools.cache
    def plan_of(layers):
        method = cut_at(layers, BLOCKS)
        return pj.plan(
            method, model, params, BATCH, optimizer=optax.adam(1e-3), loss=lambda y, b: jnp.mean(y**2)
        )

    needed = {layers: plan_of(layers).needed for layers in (1, 2, 3)}
    assert needed[1] < needed[2] < needed[3]

    def within(layers):
        plan = plan_of(layers)
        return dataclasses.replace(plan, capacity=needed[2])

    assert largest(within, 1, most=BLOCKS).best.value == 2


def test_it_is_one_way_of_running_the_blocks():
    with pytest.raises(PeftError, match="layers must be positive"):
        pj.pockengine(layers=0)
    once = pj.pockengine(layers=2).model(backbone(4)[0])
    with pytest.raises(PeftError, match="both run the blocks"):
        pj.pockengine(layers=1).model(once)
