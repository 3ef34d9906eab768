"""Attention by a platform's kernel has the meaning of row blocks; interpreted, or lowered and not run."""

import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import normal, quick_at

import peftjax as pj
from peftjax.backbone import flash_attention
from peftjax.backbone.attention import Visibility, attend
from peftjax.backbone.flash_attention import flash_attend, rows
from peftjax.kernels.attention import gpu, tpu
from peftjax.kernels.attention.operands import Operands, Scores
from peftjax.models.decoder import decoder
from peftjax.models.llama import read_config

KEYS = jax.random.split(jax.random.key(0), 6)
LLAMA = {
    "model_type": "llama", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "tie_word_embeddings": False,
}  # fmt: skip


def operands(length, keys=None, heads=4, kv_heads=2, width=16, dtype=jnp.float32, **given):
    keys = length if keys is None else keys
    shapes = (2, length, heads, width), (2, keys, kv_heads, width), (2, keys, kv_heads, width)
    arrays = (normal(key, shape, dtype) for key, shape in zip(KEYS, shapes))
    return Operands(*arrays, **{"mask": None, "segments": None, "window": None, "sinks": None, **given})


def padded(length, first, last):
    """A mask that hides tokens before `first` in one row, and from `last` on in the other."""
    mask = np.ones((2, length), bool)
    mask[0, :first] = mask[1, last:] = False
    return jnp.asarray(mask)


CASES = {
    "all": (
        600,
        {"causal": True, "windows": (70,), "softcap": 2.0, "scale": 0.3},
        {"mask": (9, 500), "parts": 3},
    ),
    "causal": (130, {"causal": True}, {}),
    "both ways": (197, {"softcap": 5.0}, {}),
    "both ways, padded": (130, {}, {"mask": (9, 100)}),
    "packed": (256, {"causal": True}, {"parts": 4}),
    "a window both ways": (300, {"windows": (40,)}, {}),
    "sinks": (200, {"causal": True, "windows": (64,)}, {"sinks": True, "mask": (0, 150)}),
}


@pytest.mark.parametrize("name", quick_at(CASES, 0))
def test_splash_attention_is_the_reference(name):
    length, static, extra = CASES[name]
    given = {}
    if "mask" in extra:
        given["mask"] = padded(length, *extra["mask"])
    if "parts" in extra:
        given["segments"] = jnp.asarray(np.arange(length) * extra["parts"] // length + np.array([[0], [7]]))
    if "sinks" in extra:
        given["sinks"] = normal(KEYS[4], (4,))
    own = operands(length, **given)
    scores = Scores(**{"scale": 0.25, **static})
    seen = (
        jnp.ones((2, length), bool) if own.mask is None else own.mask
    )  # what no token reads is not compared

    def both(attention):
        def loss(query, key, value, sinks):
            out = attention(own._replace(query=query, key=key, value=value, sinks=sinks), scores)
            return jnp.sum(jnp.where(seen[..., None, None], jnp.sin(out), 0)), out

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*own[:3], own.sinks)

    (_, out), grads = both(functools.partial(tpu.attend, interpret=True))
    (_, wanted), of_rows = both(rows)
    np.testing.assert_allclose(out[seen], wanted[seen], atol=2e-6)
    for got, want in zip(grads, of_rows):
        np.testing.assert_allclose(got, want, atol=3e-6 * max(1.0, float(jnp.abs(want).max())))


@pytest.mark.slow
def test_splash_attention_of_fewer_queries_and_of_a_window_known_at_run_time():
    apart = operands(70, 150, mask=padded(150, 3, 140))
    got = jax.jit(functools.partial(tpu.attend, scores=Scores(0.25), interpret=True))(apart)
    np.testing.assert_allclose(got, rows(apart, Scores(0.25)), atol=2e-6)
    scores = Scores(0.25, causal=True, windows=(20, 2**31 - 1))
    run = jax.jit(functools.partial(tpu.attend, scores=scores, interpret=True))
    for window in scores.windows:
        one = operands(150, window=jnp.int32(window))
        np.testing.assert_allclose(run(one), rows(one, scores), atol=2e-6)


@pytest.mark.parametrize("length", [1, 128, 700])
@pytest.mark.parametrize("order", [tpu._Order(True, None), tpu._Order(True, 130), tpu._Order(False, 200)])
def test_a_block_of_the_mask_says_what_its_pairs_are(order, length):
    length = -(-length // 128) * 128
    places = np.arange(length)
    whole = order(places[:, None], places[None])
    mask = tpu._OrderMask((length, length), order)
    for row in range(0, length, 128):
        for column in range(0, length, 128):
            block = slice(row, row + 128), slice(column, column + 128)
            got, want = mask[block], whole[block]
            assert (got.any(), got.all()) == (want.any(), want.all())
            assert got.size == 1 or np.array_equal(got, want)


@pytest.mark.slow
def test_on_a_cpu_flash_is_row_blocks():
    query, key, value = operands(100)[:3]
    settings = {"visible": Visibility(True, 20), "scale": None, "softcap": 2.0, "sinks": None}
    mask = padded(100, 3, 90)

    def flash(*args):
        return flash_attend(*args, mask=mask, segments=None, windows=(), mesh=None, **settings)

    def plain(*args):
        return attend(*args, mask=mask, **settings)

    def both_ways(f):
        return jax.jit(jax.value_and_grad(lambda *args: jnp.sum(jnp.sin(f(*args))), (0, 1, 2)))

    got, want = (both_ways(f)(query, key, value) for f in (flash, plain))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    stacked = [jnp.stack([x, 2 * x]) for x in (query, key, value)]
    np.testing.assert_allclose(jax.vmap(flash)(*stacked), jax.vmap(plain)(*stacked), atol=1e-6)


def model_of(attention, windows=()):
    config = dataclasses.replace(read_config(LLAMA), windows=windows)
    model = decoder(config, head="causal_lm", remat="nothing_saveable")
    return dataclasses.replace(model, attention=attention)


def gradients(model, **batch):
    """Of a LoRA, as a function of its values."""
    method = pj.lora(rank=2)
    frozen, trainable = method.init(jax.random.key(1), model.init(jax.random.key(0)))
    trainable = jax.tree.map(lambda leaf: leaf + 0.01, trainable)
    forward = pj.adapt(method.model(model))
    ids = jax.random.randint(jax.random.key(2), (2, 40), 0, 96)
    batch = {"input_ids": ids, "labels": ids, **batch}
    loss = lambda trainable: pj.losses.cross_entropy(forward(method.apply(frozen, trainable), batch), batch)
    return jax.jit(jax.value_and_grad(loss)), trainable


@pytest.mark.slow
def test_a_model_trains_the_same_on_a_cpu():
    batch = {"attention_mask": jnp.asarray(np.arange(40) < np.array([[40], [30]])).astype(jnp.int32)}
    both = (gradients(model_of(attention), **batch) for attention in ("flash", "rows"))
    got, want = (run(trainable) for run, trainable in both)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_lowered_for_a_tpu_the_step_has_the_kernels_also_of_layers_that_differ():
    run, trainable = gradients(model_of("flash", windows=(20, None)))
    text = run.trace(trainable).lower(lowering_platforms=("tpu",)).as_text(debug_info=True)
    assert all(name in text for name in ("splash_mha_fwd", "splash_mha_dq", "splash_mha_dkv"))
    run, trainable = gradients(model_of("rows"))
    assert "splash" not in run.trace(trainable).lower(lowering_platforms=("tpu",)).as_text(debug_info=True)


def test_what_no_kernel_computes_is_said_once(caplog):
    flash_attention.warn_of_rows.cache_clear()
    model = model_of("flash")
    prefix = pj.prefix(length=3)
    frozen, trainable = prefix.init(jax.random.key(1), model.init(jax.random.key(0)))
    forward = pj.adapt(prefix.model(model))
    run = lambda: forward(prefix.apply(frozen, trainable), {"input_ids": jnp.ones((1, 8), jnp.int32)}).hidden
    with caplog.at_level(logging.WARNING):
        jax.eval_shape(run)
        jax.eval_shape(run)
    assert [record.getMessage() for record in caplog.records] == [
        "attention 'flash': row blocks are taken where a prefix lies before the keys"
    ]


@pytest.mark.parametrize(
    ("refused", "scores", "given", "reason"),
    [
        (gpu.refused, Scores(1.0, softcap=2.0), {}, "no soft-capping"),
        (gpu.refused, Scores(1.0), {"segments": jnp.zeros((2, 8), jnp.int32)}, "no segments"),
        (gpu.refused, Scores(1.0), {"sinks": jnp.zeros(4)}, "no sinks"),
        (gpu.refused, Scores(1.0), {"width": 12}, "no heads of 12"),
        (gpu.refused, Scores(1.0), {"dtype": jnp.float32}, "no float32"),
        (gpu.refused, Scores(1.0, windows=(4,)), {}, "without causal order"),
        (gpu.refused, Scores(1.0, causal=True, windows=(4,)), {"mask": jnp.ones((2, 8), bool)}, None),
        (tpu.refused, Scores(1.0, causal=True), {"keys": 16}, "not as many"),
        (tpu.refused, Scores(1.0), {"dtype": jnp.float16}, "no float16"),
    ],
)
def test_what_a_kernel_refuses(refused, scores, given, reason):
    found = refused(operands(8, **{"dtype": jnp.bfloat16, **given}), scores)
    assert found is reason is None or reason in found


def test_padding_behind_is_told_from_padding_before():
    mask = jnp.asarray([[1, 1, 0], [1, 1, 1]], bool)
    assert gpu.padded_behind(mask)
    assert not gpu.padded_behind(mask[:, ::-1])


def test_an_unknown_attention_is_an_error():
    with pytest.raises(pj.PeftError, match="'splash' is not one of rows, flash"):
        model_of("splash")
