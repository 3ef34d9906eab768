"""Generation with a cache is generation without one, whatever the padding, the weights, the devices."""

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support import all_but_slow, noisy
from tiny_decoder import PROMPTS, VOCABULARY, make_decoder, padded, without_cache

import peftjax as pj
from peftjax.core.errors import PeftError
from peftjax.generation import generate as whole
from peftjax.generation.decode import start, step
from peftjax.generation.sampling import choice
from peftjax.models.bert import bert
from peftjax.models.bert_config import BertConfig
from peftjax.models.decoder import DecoderEmbed, decoder

NEW = 9
UNPADDED = {"input_ids": np.array([PROMPTS[0], PROMPTS[0][::-1]])}


@pytest.fixture(scope="module")
def tiny():
    return make_decoder()


@pytest.fixture(scope="module")
def wanted(tiny):
    tokens, lead = without_cache(*tiny, PROMPTS, NEW)
    assert lead > 1e-3  # rounding cannot decide
    assert len(set(tokens.ravel())) > NEW
    return tokens


def test_padding_on_either_side_changes_nothing(tiny, wanted):
    both = padded(PROMPTS, "left", 8)
    both = {name: np.pad(rows, ((0, 0), (0, 2))) for name, rows in both.items()}
    for batch in (padded(PROMPTS, "left", 10), padded(PROMPTS, "right", 10), both):
        batch["input_ids"][batch["attention_mask"] == 0] = 7
        made = pj.generate(*tiny, batch, max_new_tokens=NEW)
        np.testing.assert_array_equal(made.tokens, wanted)
        np.testing.assert_array_equal(made.lengths, [NEW] * 3)
        assert made.tokens.dtype == made.lengths.dtype == jnp.int32


def test_without_a_mask_all_are_tokens(tiny, wanted):
    made = pj.generate(*tiny, {"input_ids": np.array(PROMPTS[:1])}, max_new_tokens=NEW)
    np.testing.assert_array_equal(made.tokens, wanted[:1])


VARIANTS = {
    "window": {"window": 4},
    "gemma": {
        "per_layer": {"window": jnp.array([3, 100, 5])},
        "softcap": 5.0,
        "query_scale": 0.5,
        "norm": "rms_plus_one",
        "norm_order": "sandwich",
        "qk_norm": True,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", all_but_slow(VARIANTS, ("window",)))
def test_other_blocks(name, tiny, wanted):
    model, params = make_decoder(**VARIANTS[name])
    tokens, lead = without_cache(model, params, PROMPTS, NEW)
    assert lead > 1e-3
    assert (tokens != wanted).any()
    made = pj.generate(model, params, padded(PROMPTS), max_new_tokens=NEW)
    np.testing.assert_array_equal(made.tokens, tokens)


@pytest.mark.slow
def test_bfloat16_logits_and_cache():
    """The logits of a cached step are those of the whole sequence, and the cache is in bfloat16."""
    model, params = make_decoder(dtype="bfloat16")
    ids = UNPADDED["input_ids"]
    full = jax.jit(lambda params: model(params, {"input_ids": ids}).dense()[:, -2:])(params)
    full = np.asarray(full, np.float32)
    first, decoding = jax.jit(partial(start, model, room=1))(params, {"input_ids": ids[:, :-1]})
    second, decoding = jax.jit(partial(step, model))(params, decoding, ids[:, -1])
    assert {leaf.dtype for leaf in jax.tree.leaves(decoding.cache)} == {jnp.dtype(jnp.bfloat16)}
    assert first.dtype == second.dtype == jnp.float32
    np.testing.assert_allclose(np.stack([first, second], 1), full, atol=0.02 * np.abs(full).max())


def test_a_row_ends_with_its_stop_token(tiny, wanted):
    batch = padded(PROMPTS, "left", 10)
    stops = (int(wanted[0, 3]), int(wanted[1, 1]))
    made = pj.generate(*tiny, batch, max_new_tokens=NEW, stop_ids=stops, pad_id=60)
    lengths = [next((n + 1 for n, token in enumerate(row) if token in stops), NEW) for row in wanted]
    assert lengths == [4, 2, NEW]
    np.testing.assert_array_equal(made.lengths, lengths)
    for row, length, tokens in zip(wanted, lengths, made.tokens):
        np.testing.assert_array_equal(tokens, [*row[:length], *[60] * (NEW - length)])


CALLS = []


class Counted(DecoderEmbed):
    @nn.compact
    def __call__(self, batch):
        jax.debug.callback(lambda: CALLS.append(batch["input_ids"].shape))
        return super().__call__(batch)


def test_the_loop_ends_when_all_rows_have_stopped(tiny, wanted):
    model, params = tiny
    counted = dataclasses.replace(model, embed=Counted(model.config, model.dtype))
    stops = sorted({int(token) for token in wanted[:, 2]})
    made = pj.generate(counted, params, padded(PROMPTS), max_new_tokens=NEW, stop_ids=stops)
    jax.effects_barrier()
    assert int(made.lengths.max()) == 3
    assert CALLS == [(3, 7), (3, 1), (3, 1)]  # the third token is not read


@pytest.mark.slow
def test_adapters_unmerged_merged_and_mixed(tiny, wanted):
    """On the embeddings too, which are the output layer."""
    model, params = tiny
    method = pj.lora(rank=2, targets=["embed/word", "query", "down"])
    adapters = []
    for number in range(2):
        key = jax.random.key(number)
        frozen, trainable = method.init(key, params)
        adapters.append((method, frozen, noisy(trainable, key)))
    batch = padded(PROMPTS, "left", 10)
    by_adapter = []
    for _, frozen, trainable in adapters:
        unmerged, merged = (
            pj.generate(model, hook(frozen, trainable), batch, max_new_tokens=NEW).tokens
            for hook in (method.apply, method.merge)
        )
        np.testing.assert_array_equal(unmerged, merged)
        by_adapter.append(unmerged)
    assert (by_adapter[0] != by_adapter[1]).any(axis=1).all()
    mixed = pj.adapters.mix(adapters, jnp.array([1, -1, 0]), axis=0)
    rows = pj.generate(model, mixed, batch, max_new_tokens=NEW).tokens
    np.testing.assert_array_equal(rows, [by_adapter[1][0], wanted[1], by_adapter[0][2]])


@pytest.mark.slow
def test_sharded_over_batch_and_heads(tiny):
    model, params = tiny
    prompts = [*PROMPTS, [2, 4, 6, 8]]
    want = pj.generate(model, params, padded(prompts), max_new_tokens=NEW).tokens
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    columns, rows = P(None, None, "tensor"), P(None, "tensor", None)
    by_name = {"query": columns, "key": columns, "value": columns, "up": columns, "gate": columns}
    by_name |= {"output": rows, "down": rows}

    def spread(path, leaf):
        spec = by_name.get(path[-2].key, P()) if leaf.ndim == 3 else P()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    params = jax.tree_util.tree_map_with_path(spread, params)
    batch = jax.device_put(padded(prompts), NamedSharding(mesh, P("data")))
    made = pj.generate(model, params, batch, max_new_tokens=NEW)
    np.testing.assert_array_equal(made.tokens, want)
    _, decoding = jax.jit(partial(start, model, room=2))(params, batch)
    for leaf in jax.tree.leaves(decoding.cache):
        assert leaf.shape == (3, 4, 2, 9, 8)
        assert leaf.sharding.shard_shape(leaf.shape) == (3, 1, 1, 9, 8)


@pytest.mark.slow
def test_a_loop_of_ones_own_draws_the_same_tokens(tiny):
    model, params = tiny
    key, batch = jax.random.key(3), padded(PROMPTS, "left", 10)
    options = {"temperature": 0.9, "top_k": 30, "top_p": 0.95}
    made = pj.generate(model, params, batch, max_new_tokens=4, key=key, **options)
    again = pj.generate(model, params, batch, max_new_tokens=4, key=jax.random.key(4), **options)
    assert (made.tokens != again.tokens).any()
    choose, advance, drawn = jax.jit(choice(**options)), jax.jit(partial(step, model)), []
    logits, decoding = jax.jit(partial(start, model, room=3))(params, batch)
    for count in range(4):
        drawn.append(choose(logits, key, count))
        logits, decoding = advance(params, decoding, drawn[-1])
    np.testing.assert_array_equal(np.stack(drawn, 1), made.tokens)
    assert jnp.isnan(logits).all()  # a fourth token had no room
    np.testing.assert_array_equal(decoding.positions, [len(prompt) + 4 for prompt in PROMPTS])


def test_positions_may_be_given(tiny):
    """They are moved with their tokens, and go on from the last one."""
    batch = padded(PROMPTS, "right")
    positions = np.where(batch["attention_mask"], 10 + 2 * np.arange(7), 0)
    model, params = tiny
    logits, decoding = jax.jit(partial(start, model, room=0))(params, {**batch, "position_ids": positions})
    np.testing.assert_array_equal(decoding.positions, [10 + 2 * (len(p) - 1) + 1 for p in PROMPTS])
    at = jnp.array([len(p) - 1 for p in PROMPTS])
    last = jax.jit(lambda p: model(p, {**batch, "position_ids": positions}).at(at).dense()[:, 0])(params)
    np.testing.assert_allclose(logits, last, atol=1e-4)


@pytest.mark.slow
def test_a_new_temperature_or_pad_id_compiles_nothing(tiny):
    run = partial(pj.generate, *tiny, UNPADDED, max_new_tokens=2, key=jax.random.key(0))
    run(temperature=0.5, top_p=0.9)
    size = whole._generate._cache_size()
    run(temperature=1.5, top_p=0.8, pad_id=1)
    assert whole._generate._cache_size() == size


def test_a_step_changes_the_cache_in_place():
    """The compiled step writes in the cache it is given, beside which it holds one layer's at most."""
    model, _ = make_decoder()
    model = dataclasses.replace(model, num_layers=12)
    params = jax.eval_shape(model.init, jax.random.key(0))
    batch = {"input_ids": jax.ShapeDtypeStruct((4, 8), jnp.int32)}
    _, decoding = jax.eval_shape(partial(start, model, room=4096), params, batch)
    tokens = jax.ShapeDtypeStruct((4,), jnp.int32)
    run = jax.jit(partial(step, model), donate_argnums=1)
    memory = run.lower(params, decoding, tokens).compile().memory_analysis()
    cache = sum(leaf.size * 4 for leaf in jax.tree.leaves(decoding.cache))
    assert memory.alias_size_in_bytes >= cache
    assert memory.temp_size_in_bytes < 1.5 * cache / 12


def encoder():
    config = BertConfig(
        vocab_size=9,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        max_position_embeddings=8,
    )
    return bert(config, head="masked_lm")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be 1"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 3}, "no effect at temperature 0"),
        ({"temperature": 1.0}, "needs a key"),
        ({"temperature": 1.0, "top_k": 0}, "top_k must be 1"),
        (
            {"temperature": 1.0, "top_k": VOCABULARY + 1, "key": jax.random.key(0)},
            "top_k must be 1 to the 61",
        ),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p"),
        ({"stop_ids": [VOCABULARY]}, "stop id 61"),
        ({"batch": {"ids": np.ones((1, 2))}}, "'input_ids'"),
        ({"batch": {**UNPADDED, "segment_ids": np.ones((2, 7))}}, "no use for 'segment_ids'"),
        ({"batch": {"input_ids": np.ones(3, int)}}, r"\[B, P\]"),
        ({"batch": {**UNPADDED, "attention_mask": np.ones((2, 6))}}, "one shape"),
        (
            {"batch": {**UNPADDED, "attention_mask": np.array([[1] * 7, [0, 1, 0, 1, 1, 1, 1]])}},
            "row 1 .*between",
        ),
        ({"batch": {**UNPADDED, "attention_mask": np.array([[0] * 7, [1] * 7])}}, "row 0 .*no token"),
        ({"model": encoder()}, "'bert' is an encoder"),
        ({"model": lambda params, batch: batch}, "not a function"),
        ({"model": decoder(make_decoder()[0].config, head="none")}, "head='causal_lm'"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_bad_input_is_one_sentence(given, message, tiny):
    given = {"model": tiny[0], "batch": UNPADDED, "max_new_tokens": 2, **given}
    with pytest.raises(PeftError, match=message):
        pj.generate(given.pop("model"), tiny[1], given.pop("batch"), **given)


def test_learned_positions_are_not_passed(tiny):
    """Only a model without rotation is limited: by its tokens, not by the padding."""
    model, params = tiny
    config = dataclasses.replace(
        model.config, rope=None, block=dataclasses.replace(model.config.block, rotary=False)
    )
    model = decoder(dataclasses.replace(config, max_positions=8))
    batch = padded(PROMPTS, "left", 10)
    assert pj.generate(model, params, batch, max_new_tokens=2).tokens.shape == (3, 2)
    for given in (batch, {**batch, "position_ids": np.arange(10)[None] - 3 + 0 * batch["input_ids"]}):
        with pytest.raises(PeftError, match="9 positions are needed and the model has learned 8"):
            pj.generate(model, params, given, max_new_tokens=3)
