"""What a step needs, compiled for machines that are not there."""

import os
from importlib import resources
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import optax
import pytest
from support import KEY, assert_close

import peftjax as pj
from peftjax.core import compat, tree
from peftjax.planner import machine as machines
from peftjax.planner.compiling import DoesNotFit
from peftjax.planner.specification import specifications
from peftjax.planner.step import method_loss

L, D, F, B = 3, 64, 256, 32
F32 = jnp.float32


def model(params, batch):
    def block(x, layer):
        return x + jnp.tanh(x @ layer["up"]["kernel"].astype(F32)) @ layer["down"]["kernel"].astype(F32), None

    return jax.lax.scan(block, batch["x"], params["blocks"])[0] @ params["head"]["kernel"]


def shapes_of(dtype=F32):
    kernel = lambda *shape, dtype=dtype: {"kernel": jax.ShapeDtypeStruct(shape, dtype)}
    return {"blocks": {"up": kernel(L, D, F), "down": kernel(L, F, D)}, "head": kernel(D, 10, dtype=F32)}


BATCH = {"x": jax.ShapeDtypeStruct((B, D), F32), "labels": jax.ShapeDtypeStruct((B,), jnp.int32)}
LORA = pj.chain(pj.lora(rank=4), pj.unfreeze(["head"]))


def plan(method=LORA, dtype=F32, target="cpu", **options):
    shapes = shapes_of(dtype)
    return pj.plan(method, model, shapes, BATCH, optimizer=optax.adam(1e-3), target=target, **options)


def needs(module):
    return pytest.mark.skipif(not machines._is_installed(module), reason=f"{module} is not installed")


ON_EVERY_TARGET = pytest.mark.parametrize(
    "target",
    [
        "cpu",
        pytest.param("h200", marks=[pytest.mark.slow, needs("jax_plugins.xla_cuda13")]),
        pytest.param("h100", marks=[pytest.mark.slow, needs("jax_plugins.xla_cuda13")]),
        pytest.param("v5e:2x2", marks=[pytest.mark.slow, needs("libtpu")]),
    ],
)


@ON_EVERY_TARGET
def test_the_kinds_of_arguments_are_what_the_compiler_is_given(target):
    found = plan(target=target)
    sizes = found.bytes
    kinds = (sizes.weights, sizes.method_state, sizes.trainable, sizes.optimizer, sizes.batch)
    assert sum(kinds) == sizes.arguments
    assert 0 <= sizes.outputs - sizes.aliased <= 1024  # the loss; all else is written over an argument
    assert sizes.peak == sizes.arguments + sizes.temporaries + sizes.outputs - sizes.aliased
    factors = 2 * L * 4 * (D + F)
    assert found.trainable_parameters == factors + D * 10
    assert found.flops > 0
    assert not found.uncounted


@ON_EVERY_TARGET
def test_an_optimizer_on_the_host_is_no_argument_of_the_device(target):
    here, there = plan(target=target).bytes, plan(target=target, optimizer_memory="pinned_host").bytes
    assert there.weights + there.trainable + there.optimizer + there.batch == there.arguments
    assert there.arguments == here.arguments - (here.optimizer - there.optimizer)
    assert here.host == 0
    if target != "cpu":  # which has one memory
        assert there.optimizer < 0.1 * here.optimizer  # its counter
        assert there.host >= 2 * (2 * L * 4 * (D + F) + D * 10) * 4


def test_bytes_on_a_cpu_are_those_of_the_arrays():
    sizes = plan().bytes
    assert sizes.weights == 2 * L * D * F * 4
    assert sizes.trainable == (2 * L * 4 * (D + F) + D * 10) * 4
    assert sizes.optimizer == 2 * sizes.trainable + 4  # two moments and a counter
    assert sizes.batch == tree.nbytes(BATCH)
    assert sizes.aliased == sizes.trainable + sizes.optimizer


def test_a_bfloat16_base_takes_half_and_is_not_trained():
    half, whole = plan(dtype=jnp.bfloat16).bytes, plan().bytes
    assert 2 * half.weights == whole.weights
    assert half.trainable == whole.trainable


def test_full_fine_tuning_holds_no_frozen_weight_and_a_dense_gradient():
    sizes = plan(pj.full()).bytes
    assert (sizes.weights, sizes.trainable) == (0, tree.nbytes(shapes_of()))
    assert sizes.temporaries >= 2 * L * D * F * 4


def test_flops_are_those_counted_by_hand():
    product = 2 * B * D * F
    # Forward, the gradient of the input and that of the kernel; the first layer's input has none, but a scan
    # does not know.
    blocks, head = 3 * 2 * L * product, 3 * 2 * B * D * 10
    assert plan(pj.full()).flops == blocks + head
    thin = 2 * B * 4 * (D + F)
    # LoRA: no gradient of the kernel, and of its two thin products three each.
    assert plan().flops == 2 * 2 * L * product + head + 3 * 2 * L * thin


def test_a_method_in_place_needs_no_product_of_its_own():
    rows = lambda **options: plan(pj.paca(rank=4, targets=["up", "down"], **options))
    beside, inside = rows(), rows(in_place=True)
    assert inside.bytes.method_state > beside.bytes.method_state  # the original rows
    # Forward and for the gradient of the input, the rows' own product; and that of the values in both.
    assert beside.flops - inside.flops == 2 * 2 * L * B * 4 * (D + F)


@pytest.mark.slow
@needs("libtpu")
def test_a_step_that_does_not_fit_is_an_error_with_its_size():
    params = {**shapes_of(), "unused": jax.ShapeDtypeStruct((2**33,), F32)}
    with pytest.raises(DoesNotFit, match=r"chain on v5e:2x2: .*exceeds available HBM \(15\.75G\)") as told:
        pj.plan(LORA, model, params, BATCH, optimizer=optax.adam(1e-3), target="v5e:2x2")
    assert told.value.capacity == specifications()["v5e"].memory
    assert told.value.needed == pytest.approx(4 * 2**33, rel=0.01)


@pytest.mark.slow
def test_the_step_is_the_loop_of_the_readme():
    params = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.01, leaf.dtype), shapes_of())
    batch = {"x": jnp.ones((B, D)), "labels": jnp.zeros(B, jnp.int32)}
    frozen, trainable = LORA.init(KEY, params)
    tx = LORA.optimizer(optax.sgd(0.1))

    def loss_fn(trainable):
        return pj.losses.cross_entropy(pj.adapt(model)(LORA.apply(frozen, trainable), batch), batch)

    updates, _ = tx.update(jax.grad(loss_fn)(trainable), tx.init(trainable), trainable, frozen=frozen)
    training = pj.training(LORA, method_loss(LORA, model, pj.losses.cross_entropy), optax.sgd(0.1))
    state, metrics = training.step(training.begin(frozen, trainable, KEY), batch)
    assert_close(state.trainable, optax.apply_updates(trainable, updates), 1e-6)
    assert float(metrics["loss"]) == pytest.approx(float(loss_fn(trainable)), rel=1e-6)


def test_arrays_and_a_key_in_the_frozen_state_are_counted():
    def init(key, params):
        return pj.Frozen(params, {"key": jax.random.split(key, 3)}), {"shift": jnp.zeros(10)}

    def apply(frozen, trainable, *, key=None):
        return {**frozen.params, "head": {"kernel": frozen.params["head"]["kernel"] + trainable["shift"]}}

    sizes = plan(pj.Transform("shift", {}, init, apply)).bytes
    assert sizes.method_state == 3 * 8
    assert sizes.weights == tree.nbytes(shapes_of())


@pytest.mark.parametrize(
    ("shape", "order", "tiling", "held"),
    [
        ((768, 8), (0, 1), ((8, 128),), (768, 128)),
        ((768, 8), (1, 0), ((8, 128),), (8, 768)),
        ((3, 5, 200), (0, 1, 2), ((8, 128), (2, 1)), (3, 8, 256)),
        ((5,), (0,), ((128,),), (128,)),
        ((5,), (0,), ((2, 128),), (2, 128)),
        ((5, 7), (0, 1), (), (5, 7)),
    ],
)
def test_a_device_fills_up_the_tiles_of_its_layout(shape, order, tiling, held):
    layout = SimpleNamespace(major_to_minor=order, tiling=tiling)
    assert compat.padded_shape(shape, layout) == held


@pytest.mark.slow
def test_what_is_done_between_steps_is_compiled_too():
    found = plan(pj.galore(rank=4, together=1))
    assert len(found.between) == 2
    assert all(peak > found.bytes.arguments for peak in found.between)
    assert "peak between steps" in str(found)
    assert plan().between == ()


@pytest.mark.slow
@pytest.mark.parametrize(
    "target", ["cpu", pytest.param("h200", marks=[pytest.mark.slow, needs("jax_plugins.xla_cuda13")])]
)
def test_what_is_written_at_each_step_is_not_held_between_steps(target):
    rank = 16
    gathered, written = (plan(pj.galore(rank=rank, write=w), target=target) for w in ("refresh", "step"))
    z = 2 * L * rank * F * 4
    assert gathered.bytes.trainable - written.bytes.trainable == z + 2 * L * 4
    assert written.bytes.peak < gathered.bytes.peak - 0.8 * z
    assert written.kept == gathered.kept


def test_the_text_names_target_peak_and_flops():
    found = plan()
    text = str(found)
    assert text.startswith("chain on cpu (cpu)")
    assert f"{found.bytes.peak / 2**20:,.2f} MiB" in text
    assert f"{found.flops:.4g}" in text


@pytest.mark.parametrize("name", machines.GPUS)
def test_the_descriptions_of_gpus_are_package_data(name):
    text = machines.gpu_description(name)
    assert f"NVIDIA {name.upper()}" in text
    assert "core_count: 132" in text
    assert (resources.files("peftjax.planner") / f"{name}.pbtxt").is_file()


def test_an_unknown_target_is_named_with_the_nearest():
    with pytest.raises(pj.PeftError, match=r"'h20'; closest: 'h200'"):
        plan(target="h20")
    with pytest.raises(pj.PeftError, match=r"'v5e'; closest: 'v5e:2x2'"):
        plan(target="v5e")


@pytest.mark.parametrize(
    ("target", "command"),
    [
        ("h200", f"pip install --no-deps jax-cuda13-pjrt=={jax.__version__} "),
        ("v5e:2x2", "pip install libtpu"),
    ],
)
def test_a_missing_compiler_is_named_with_its_command(target, command, monkeypatch):
    monkeypatch.setattr(machines, "_is_installed", lambda module: False)
    with pytest.raises(pj.PeftError, match=f"needs .*: {command}"):
        plan(target=target)


def test_the_environment_is_as_before(monkeypatch):
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "0")
    monkeypatch.delenv("TPU_WORKER_HOSTNAMES", raising=False)
    with machines._defaults(machines.LIBTPU):
        assert os.environ["TPU_SKIP_MDS_QUERY"] == "0"
        assert os.environ["TPU_WORKER_HOSTNAMES"] == "localhost"
    assert "TPU_WORKER_HOSTNAMES" not in os.environ
