"""What LST's backward pass keeps and computes, read from the traced program."""

import math

import jax
import jax.numpy as jnp
import pytest
from support import KEY
from tiny_models import BLOCKS, TOKENS, WIDTH, tiny

import peftjax as pj
from peftjax.core import compat
from peftjax.models.bert import BertConfig, bert
from peftjax.planner.residuals import kept_arrays

B, S, D, L, N = 2, 9, 24, 4, 2
BATCH = {"input_ids": jax.ShapeDtypeStruct((B, S), jnp.int32)}


def encoder(inner=40, dtype="float32", remat=None):
    sizes = {"hidden_size": D, "num_hidden_layers": L, "num_attention_heads": N, "intermediate_size": inner}
    config = BertConfig(vocab_size=11, max_position_embeddings=S, **sizes)
    model = bert(config, head="none", dtype=dtype, remat=remat)
    return model, jax.eval_shape(model.init, KEY)


def loss_of(model, params, **options):
    """`(trainable, frozen, batch) -> loss`, and the shapes of the first two."""
    method = pj.lst(reduction=2, **options)
    frozen, trainable = jax.eval_shape(method.init, KEY, params)
    run = pj.adapt(method.model(model))

    def loss(trainable, frozen, batch):
        return jnp.sum(jnp.sin(run(method.apply(frozen, trainable), batch).astype(jnp.float32)))

    return loss, trainable, frozen


def kept(model, params, **options):
    loss, trainable, frozen = loss_of(model, params, **options)
    return kept_arrays(loss, trainable, frozen, BATCH)


def equations(jaxpr):
    """The equations of a jaxpr and of those inside it."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


@pytest.mark.parametrize("used", [[0, 1, 2, 3], [1, 3]])
def test_a_used_layer_keeps_its_state_and_a_block_of_half_the_width(used):
    """h_0 and h_i+1 are D wide; a post-norm block keeps 8 d + F / r, and its stream d before the gate."""
    arrays = kept(*encoder(), side_layers=used)
    tokens, n = B * S, len(used)
    half, inner = D // 2, 20
    wide = [a for a in arrays if a.shape[-3:] == (B, S, D)]
    # What the loss itself reads is the last of them.
    assert sorted((a.shape for a in wide), key=len) == [(B, S, D), (B, S, D), (n, B, S, D)]
    layers = [a for a in arrays if a.ndim > 2 and a.shape[:2] == (n, B) and a.shape[-1] != D]
    assert sum(math.prod(a.shape) for a in layers) == n * tokens * (9 * half + inner)
    rest = sum(math.prod(a.shape) for a in arrays) - sum(math.prod(a.shape) for a in [*wide, *layers])
    assert rest <= tokens * half + tokens  # the stream that is mapped up, the mask


@pytest.mark.slow
def test_the_width_of_the_backbones_feed_forward_costs_a_part_of_it():
    size = lambda inner: sum(math.prod(a.shape) for a in kept(*encoder(inner)))
    assert size(80) - size(40) == L * B * S * 20


def test_in_bfloat16_no_state_is_kept_in_float32():
    arrays = [a for a in kept(*encoder(dtype="bfloat16")) if a.ndim == 4]
    assert arrays
    assert {a.dtype for a in arrays} == {jnp.dtype(jnp.bfloat16)}


def test_under_remat_a_layer_keeps_its_state_and_its_stream():
    arrays = kept(*encoder(remat="nothing_saveable"))
    assert sorted(a.shape for a in arrays if a.ndim == 4) == [(L, B, S, D // 2), (L, B, S, D)]


@pytest.mark.parametrize("options", [{}, {"merge_last": True, "side_layers": [1]}])
def test_each_weight_of_the_backbone_is_in_one_product_of_a_step(options):
    """And none is in one of the backward pass: q, k, v and o, up and down, once each in the scan."""
    model, params = encoder(inner=52)
    loss, trainable, frozen = loss_of(model, params, **options)
    step = jax.make_jaxpr(jax.value_and_grad(loss))(trainable, frozen, BATCH)
    operands = [
        variable.aval.shape
        for eqn in equations(compat.open_jaxpr(step)[0])
        if eqn.primitive.name == "dot_general"
        for variable in eqn.invars
    ]
    # With layers after the last used one, their scan is another program.
    programs = 2 if options else 1
    assert operands.count((D, D)) == 4 * programs
    assert operands.count((D, 52)) == operands.count((52, D)) == programs


def test_no_layer_is_run_whose_state_is_not_read():
    model, params = encoder()

    def steps(**options):
        loss, trainable, frozen = loss_of(model, params, **options)
        jaxpr = compat.open_jaxpr(jax.make_jaxpr(loss)(trainable, frozen, BATCH))[0]
        return [eqn.params["length"] for eqn in equations(jaxpr) if eqn.primitive.name == "scan"]

    assert steps(side_layers=[1]) == [2, 1]
    assert steps(side_layers=[1], merge_last=True) == [2, 2, 1]


@pytest.mark.slow
def test_the_network_beside_a_decoder_keeps_no_probabilities():
    model = tiny("backbone").forward
    params = jax.eval_shape(model.init, KEY)
    arrays = kept_arrays(*loss_of(model, params), {"input_ids": TOKENS})
    assert all(a.shape[-1] <= WIDTH for a in arrays)
    assert sum(a.shape == (BLOCKS, 2, 5, WIDTH) for a in arrays) == 1
