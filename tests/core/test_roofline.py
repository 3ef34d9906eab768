"""What devices can do, and the least time of a step by it."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest

import peftjax as pj
from peftjax.planner import machine, step
from peftjax.planner.collectives import Traffic, by_kind, collectives
from peftjax.planner.flops import Flops, count_flops
from peftjax.planner.reads import count_reads
from peftjax.planner.roofline import Roofline, roofline
from peftjax.planner.specification import Specification, find_specification, specifications

L, D, B = 3, 8, 4
DEVICE = Specification(1000, {"bfloat16": 100.0, "float32": 50.0}, 10.0, 5.0, ())


def test_every_kind_of_target_is_described_with_its_sources():
    kinds = {name.partition(":")[0] for name in (*machine.GPUS, *machine.TPU_EXAMPLES)}
    assert kinds == specifications().keys()
    for device in specifications().values():
        assert device.sources
        assert all(source.startswith("https://") for source in device.sources)
        assert 15 * 2**30 < device.memory < 2**38
        assert device.links < device.bandwidth < device.rate("bfloat16")
        assert device.rate("float32") <= device.rate("bfloat16")
    assert find_specification("v5e:16x16") == specifications()["v5e"]
    assert find_specification("h200:8") == specifications()["h200"]
    assert find_specification("cpu") is None


@pytest.mark.parametrize("name", machine.GPUS)
def test_a_gpu_is_the_one_that_its_compiler_is_told_of(name):
    text = machine.gpu_description(name)
    told = dict(re.findall(r"(\w+): (\d+)", text))
    found = specifications()[name]
    assert int(told["device_memory_size"]) == found.memory
    assert float(told["memory_bandwidth"]) == found.bandwidth


def test_the_bound_by_hand():
    flops = Flops(1000, by_dtype={"bfloat16": 600, "float32": 300})  # 100 are of an unknown dtype
    traffic = [Traffic(1, 80, 60.0), Traffic(2, 40, 40.0)]
    found = roofline(DEVICE, flops, 70, traffic, devices=2)
    assert found == Roofline(compute=(6 + 6 + 1) / 2, memory=7.0, network=20.0)
    assert (found.seconds, found.limit) == (20.0, "network")
    assert roofline(DEVICE, flops, 70, []).limit == "compute"


def test_products_are_counted_by_the_dtype_of_their_operands():
    x, w = jnp.ones((2, 3)), jnp.ones((3, 5))
    half = jnp.bfloat16

    def fn(x, w):
        return jax.lax.scan(lambda c, _: (c + 1, x.astype(half) @ w.astype(half)), 0, length=7)[1], x @ w

    found = count_flops(jax.make_jaxpr(fn)(x, w))
    assert found.by_dtype == {"bfloat16": 7 * 60, "float32": 60}
    assert found.total == 8 * 60


def test_bytes_that_pass_the_links():
    text = """HloModule m

ENTRY %main (p: f32[4,8]) -> f32[32,8] {
  %a = f32[32,8]{1,0} all-gather(%p), channel_id=1, replica_groups=[1,8]<=[8], dimensions={0}
  %b = f32[4,8]{1,0} reduce-scatter(%q), channel_id=2, replica_groups={{0,1},{2,3}}, dimensions={0}
  %c = f32[4,8]{1,0} all-reduce(%q), channel_id=3, replica_groups=[2,4]<=[8]
  %d = f32[4,8]{1,0} all-reduce(%q), channel_id=4, replica_groups=[8,1]<=[8]
  %f = f32[32,8]{1,0} all-gather(%p), channel_id=6, replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}
  %g = f32[32,8]{1,0} all-gather(%p), channel_id=7, replica_groups=mesh['a'=2,'b'=8] {'a','b':(4)2}
  ROOT %e = f32[4,8]{1,0} collective-permute(%q), channel_id=5, source_target_pairs={{0,1}}
}
"""
    small, whole = 4 * 4 * 8, 4 * 32 * 8
    gathered = [whole * 7 / 8, whole * 3 / 4, whole * 3 / 4]
    crossing = [gathered[0], small, small, 0, *gathered[1:], small]
    assert [one.crossing for one in collectives(text)] == crossing
    found = by_kind(text)
    assert found["reduce-scatter"] == Traffic(1, 2 * small, small)
    assert found["all-reduce"] == Traffic(2, 2 * small, small)


def test_a_loop_that_counts_in_steps_turns_less_often():
    text = """HloModule m

%condition (s: (f32[4], u32[])) -> pred[] {
  %most = u32[]{:T(128)} constant(8)
  %s = (f32[4]{0}, u32[]{:T(128)}) parameter(0)
  %count = u32[]{:T(128)} get-tuple-element(%s), index=1
  ROOT %less = pred[]{:T(512)} compare(%count, %most), direction=LT
}

%body (s: (f32[4], u32[])) -> (f32[4], u32[]) {
  %two = u32[]{:T(128)} constant(2)
  %s = (f32[4]{0}, u32[]{:T(128)}) parameter(0)
  %x = f32[4]{0} get-tuple-element(%s), index=0
  %y = f32[4]{0} collective-permute(%x), channel_id=1, source_target_pairs={{0,1},{1,0}}
  %z = f32[4]{0} collective-permute(%y), channel_id=2, source_target_pairs={{0,1},{1,0}}
  %n = u32[]{:T(128)} get-tuple-element(%s), index=1
  %m = u32[]{:T(128)} add(%n, %two)
  ROOT %t = (f32[4]{0}, u32[]{:T(128)}) tuple(%z, %m)
}

ENTRY %main (s: (f32[4], u32[])) -> (f32[4], u32[]) {
  %s = (f32[4]{0}, u32[]{:T(128)}) parameter(0)
  ROOT %w = (f32[4]{0}, u32[]{:T(128)}) while(%s), condition=%condition, body=%body
}
"""
    assert by_kind(text) == {"collective-permute": Traffic(8, 8 * 16, 8 * 16)}


def loss(params, ids):
    """A table whose rows are looked up, a scanned stack, and a matrix outside of it."""

    def block(x, w):
        return jnp.sin(x @ w), None

    x = jnp.take(params["table"], ids, axis=0)
    return jnp.sum(jax.lax.scan(block, x, params["blocks"])[0] @ params["head"])


SHAPES = {
    "blocks": jax.ShapeDtypeStruct((L, D, D), jnp.float32),
    "head": jax.ShapeDtypeStruct((D, D), jnp.float32),
    "table": jax.ShapeDtypeStruct((100, D), jnp.float32),
}
IDS = jax.ShapeDtypeStruct((B,), jnp.int32)


def reads(fn):
    found = count_reads(jax.make_jaxpr(fn)(SHAPES, IDS))
    return dict(zip(SHAPES, found))


def test_a_loop_reads_what_it_goes_over_and_a_lookup_only_rows():
    assert reads(loss) == {"blocks": 1, "head": 1, "table": 0}


def test_the_backward_pass_reads_weights_again():
    # Of the table no gradient is asked, but of what was looked up: the input of the stack.
    gradient = lambda params, ids: jax.grad(lambda head: loss({**params, "head": head}, ids))(params["head"])
    assert reads(gradient) == {"blocks": 1, "head": 0, "table": 0}
    everything = reads(jax.jit(jax.grad(loss)))
    assert everything == {"blocks": 2, "head": 1, "table": 0}


def test_what_no_output_needs_is_not_read():
    assert reads(lambda params, ids: jnp.sum(params["head"])) == {"blocks": 0, "head": 1, "table": 0}


def plan(**options):
    model = lambda params, batch: jax.nn.one_hot(batch["input_ids"], D) @ params["up"]["kernel"]
    params = {"up": {"kernel": jax.ShapeDtypeStruct((D, D), jnp.float32)}}
    tokens = jax.ShapeDtypeStruct((B, 5), jnp.int32)
    batch = {"input_ids": tokens, "labels": tokens}
    return pj.plan(pj.full(), model, params, batch, optimizer=optax.sgd(1.0), **options)


def test_a_plan_says_whether_it_fits_and_how_fast_it_can_be(monkeypatch):
    unknown = plan()
    assert (unknown.fits, unknown.roofline, unknown.most_per_second) == (None, None, None)
    assert (unknown.items, unknown.unit) == (B * 5, "tokens")
    assert "fits" not in str(unknown)
    monkeypatch.setattr(step, "find_specification", lambda target: DEVICE)
    found = plan()
    kernel, batch = 4 * D * D, 2 * 4 * B * 5
    # The kernel is read forward and for its update, and written; the batch is read.
    assert found.moved >= 2 * kernel + batch
    assert found.roofline.memory == found.moved / DEVICE.bandwidth
    assert found.roofline.compute == found.flops / 50
    assert found.most_per_second == found.items / found.roofline.seconds
    assert found.fits is (found.bytes.peak + found.bytes.code <= 1000)
    assert "tokens/s" in str(found)
    assert "compute" in str(found)
