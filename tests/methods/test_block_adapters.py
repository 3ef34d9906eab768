"""What all adapters inside the blocks keep for backward, and that they generate and shard."""

import dataclasses
import math
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support import KEY, assert_close, quick_at
from tiny_decoder import PROMPTS, make_decoder, padded, without_cache
from tiny_models import BLOCKS, VOCABULARY, WIDTH, moved, tiny

import peftjax as pj

ROWS, LENGTH, SIZE = 3, 7, 3
# What a layer keeps for each token beside what the base keeps to pass a gradient on: of every block, and of a
# post-norm block too, whose frozen kernels do without their input.
KEPT = {
    "houlsby": (pj.houlsby(size=SIZE), [WIDTH, WIDTH, SIZE, SIZE], []),
    "pfeiffer": (pj.pfeiffer(size=SIZE), [WIDTH, SIZE], []),
    "parallel_adapter": (pj.parallel_adapter(size=SIZE, places="both"), [SIZE, SIZE], [WIDTH, WIDTH]),
    "parallel_adapter, norm": (pj.parallel_adapter(size=SIZE, norm="in", learn_scale=True), [SIZE], [WIDTH]),
    "adaptformer": (pj.adaptformer(size=SIZE, norm="out"), [SIZE], [WIDTH]),
    "compacter": (pj.compacter(size=4, order=2), [WIDTH, WIDTH, 4, 4], []),
    "compacter++": (pj.compacter(size=4, order=2, places="feed_forward"), [WIDTH, 4], []),
    "prefix": (pj.prefix(length=2, mlp_size=4), [], []),
    "prefix, layers": (pj.prefix(length=2, mlp_size=None, layers=[1]), [], []),
    "mam": (pj.mam(length=2, mlp_size=4, size=SIZE), [SIZE], [WIDTH]),
}


def kept(model, params, method=None):
    """Counts of `(dtype, shape of a layer)` of the arrays of every row and token that backward reads."""
    ids = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)

    def residuals(params, key, ids):
        frozen, trainable = (pj.Frozen(params), {}) if method is None else method.init(key, params)
        forward = model if method is None else method.model(model)

        def out(trainable, word):
            own = trainable if method is None else method.apply(frozen, trainable, key=key)
            own = {**(params if method is None else own), "embed": {**params["embed"], "word": word}}
            return pj.adapt(forward)(own, {"input_ids": ids}).astype(jnp.float32)

        return jax.tree.leaves(jax.vjp(out, trainable, params["embed"]["word"])[1])

    leaves = jax.eval_shape(residuals, params, KEY, ids)
    pairs = {pair for x in leaves for pair in zip(x.shape, x.shape[1:])}
    assert not pairs & {(LENGTH, LENGTH), (LENGTH, LENGTH + 2)}, "scores are kept"
    of_layers = [x for x in leaves if x.shape[:3] == (BLOCKS, ROWS, LENGTH)]
    return Counter((str(x.dtype), math.prod(x.shape[3:])) for x in of_layers)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["backbone", "encoder"])
def test_backward_keeps_for_every_token(name, dtype):
    model, params = dataclasses.replace(tiny(name).forward, dtype=dtype), tiny(name).params
    base = kept(model, params)
    assert sum(count for (of, _), count in base.items() if of == dtype) > 5
    for case, (method, widths, post_norm) in KEPT.items():
        more = kept(model, params, method)
        more.subtract(base)
        wanted = widths + post_norm * (name == "encoder")
        assert +more == Counter((dtype, width) for width in wanted), case
        assert not -more, case


@pytest.mark.slow
def test_an_adapter_beside_trained_kernels_shares_their_input():
    """The stream that a post-norm block reads is kept once for the adapter and for LoRA on `up`."""
    model, params = tiny("encoder").forward, tiny("encoder").params
    lora, adapter = pj.lora(rank=2, targets=["feed_forward/up"]), pj.mam(length=2, mlp_size=4, size=SIZE)
    more = kept(model, params, pj.chain(lora, adapter))
    more.subtract(kept(model, params))
    assert +more == Counter({("float32", WIDTH): 1, ("float32", SIZE): 1})


@pytest.mark.parametrize("case", quick_at(KEPT, every=3))
def test_dropout_keeps_no_mask(case):
    method = KEPT[case][0]
    rates = {name: 0.5 for name in ("dropout", "prefix_dropout") if name in method.config}
    again = pj.build({**pj.describe(method), **rates})
    model, params = tiny("backbone").forward, tiny("backbone").params
    assert kept(model, params, again) == kept(model, params, method)


GEMMA = {
    "per_layer": {"window": jnp.array([3, 100, 5])},
    "softcap": 5.0,
    "query_scale": 0.5,
    "norm": "rms_plus_one",
    "norm_order": "sandwich",
    "qk_norm": True,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "block"),
    [(pj.houlsby(size=3), {}), (pj.mam(length=3, mlp_size=4, size=3), GEMMA)],
    ids=["houlsby", "mam"],
)
def test_generation_with_a_cache_is_generation_without(method, block):
    model, params = make_decoder(**block)
    frozen, fresh = method.init(KEY, params)
    adapted, params = method.model(model), method.apply(frozen, moved(fresh))
    tokens, lead = without_cache(adapted, params, PROMPTS, 5)
    assert lead > 1e-3
    assert (tokens != without_cache(model, params, PROMPTS, 5)[0]).any()
    made = pj.generate(adapted, params, padded(PROMPTS, "left", 9), max_new_tokens=5)
    np.testing.assert_array_equal(made.tokens, tokens)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", [pj.houlsby(size=4), pj.mam(length=2, mlp_size=4, size=4)], ids=lambda method: method.name
)
def test_eight_devices_give_the_step_of_one(method):
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    model, params = tiny("backbone").forward, tiny("backbone").params
    ids = jax.random.randint(KEY, (4, 6), 0, VOCABULARY)
    frozen, trained = method.init(KEY, params)
    trained = moved(trained)

    def spread(leaf):
        spec = P(None, "fsdp", "tensor") if leaf.ndim == 3 and leaf.shape[1] % 2 == 0 else P()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    def loss(trained, frozen, ids):
        out = pj.adapt(method.model(model))(method.apply(frozen, trained), {"input_ids": ids})
        return jnp.sum(jnp.sin(out))

    step = jax.jit(jax.value_and_grad(loss))
    want = step(trained, frozen, ids)
    inputs = jax.tree.map(spread, (trained, frozen))
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(inputs[0]))
    assert_close(step(*inputs, jax.device_put(ids, NamedSharding(mesh, P("data")))), want)
