"""The policies that keep, or offload, what enters a block and what its attention gives."""

import dataclasses

import jax
import pytest
from models.test_coded_blocks import BATCH, KEY, METHODS, B, N, S, encoder, llama, made, step

import peftjax as pj
from peftjax.core.errors import PeftError
from peftjax.planner.flops import count_flops
from peftjax.planner.residuals import kept_arrays
from tests.support import assert_close

WIDTH, LAYERS = 64, 2


def under(remat, family="llama"):
    return dataclasses.replace({"llama": llama, "encoder": encoder}[family](), remat=remat)


def flops(remat):
    model, params = under(remat), made("llama")[1]
    loss = lambda params: pj.losses.cross_entropy(model(params, BATCH), BATCH)
    return count_flops(jax.make_jaxpr(jax.grad(loss))(params)).total


def kept(remat):
    model, params = under(remat), made("llama")[1]
    loss = lambda params: pj.losses.cross_entropy(model(params, BATCH), BATCH)
    return [x for x in kept_arrays(loss, params) if x.shape[:3] == (LAYERS, B, S)]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "encoder"])
@pytest.mark.parametrize("remat", ["save_attention", "offload_attention", "offload_attention:0.3"])
def test_values_and_gradients_are_those_without_it(family, remat):
    _, params, batch = made(family)
    value, grads = step(METHODS["lora"], under(None, family), params, batch)
    found, same = step(METHODS["lora"], under(remat, family), params, batch)
    assert found == value
    assert_close(same, grads, 1e-6)


@pytest.mark.slow
def test_attention_is_not_run_again():
    products = 2 * (2 * B * S * S * WIDTH)  # scores, and the values mixed
    assert flops("nothing_saveable") - flops("save_attention") == LAYERS * products
    assert flops("offload_attention") == flops("save_attention")
    assert flops("offload_attention:1") == flops(None)


@pytest.mark.slow
def test_what_stays_on_the_device_and_what_goes_to_the_host():
    place = lambda remat: sorted((x.shape[3:], str(x.memory_space)) for x in kept(remat))
    assert [shape for shape, _ in place("save_attention")] == [(WIDTH,), (WIDTH,)]
    assert all("Device" in space for _, space in place("save_attention"))
    offloaded = [shape for shape, space in place("offload_attention") if "Host" in space]
    assert offloaded == [(WIDTH,), (WIDTH,)]


def test_a_share_is_of_the_tokens():
    model = under("offload_attention:0.3")
    assert model.block.config.offloaded_tokens == 0.3
    model_again = dataclasses.replace(model, remat="save_attention")
    assert model_again.block.config.offloaded_tokens == 0.0
    first = int(0.3 * S)
    params = made("llama")[1]
    loss = lambda params: pj.losses.cross_entropy(model(params, BATCH), BATCH)
    shapes = [x.shape for x in kept_arrays(loss, params) if x.shape[:3] == (LAYERS, B, first)]
    heads = [(N, WIDTH // N), (2, WIDTH // N), (2, WIDTH // N)]
    assert sorted(shape[3:] for shape in shapes) == sorted([*heads, (WIDTH,), (96,), (96,)])


@pytest.mark.parametrize("remat", ["offload_attention:2", "offload_attention:x", "save_attention:0.5"])
def test_a_share_that_is_none_is_an_error(remat):
    with pytest.raises(PeftError, match=r"SHARE"):
        under(remat)


@pytest.mark.slow
def test_an_h200_holds_less():
    pytest.importorskip("jax_plugins.xla_cuda13", exc_type=ImportError)
    from peftjax.planner.machine import find_machine

    try:
        find_machine("h200")
    except PeftError as error:
        pytest.skip(str(error))
    import jax.numpy as jnp
    import optax

    model = llama(layers=8, width=512, inner=1024, dtype="bfloat16")
    shapes = jax.eval_shape(model.init, KEY)
    tokens = jax.ShapeDtypeStruct((8, 2048), jnp.int32)
    sizes = {}
    for remat in ("save_attention", "offload_attention", "offload_attention:0.5"):
        run = dataclasses.replace(model, remat=remat)
        batch = {"input_ids": tokens, "labels": tokens}
        found = pj.plan(pj.lora(rank=2), run, shapes, batch, optimizer=optax.adam(1e-3), target="h200")
        sizes[remat] = found.bytes
    assert sizes["save_attention"].host == 0
    both = 8 * 2 * (8 * 2048 * 512 * 2)
    assert sizes["offload_attention"].host == both
    assert sizes["offload_attention:0.5"].host > both
    assert sizes["save_attention"].temporaries - sizes["offload_attention"].temporaries > both / 3
