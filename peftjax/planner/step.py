"""What a training step needs, asked of the real compiler from shapes alone: no weights, no hardware.

    arguments  = weights + method state + trainable + optimizer + batch
    peak       = arguments + temporaries + (outputs - aliased)

`aliased` are the outputs written over a donated argument: the new trainable and optimizer state. Gradients
and the residuals of the backward pass are among the temporaries: the most that is needed at one time, as XLA
shares buffers between values that do not live together. The numbers are those of
`compiled.memory_analysis()`; `docs/guides/memory.md` says what each compiler's mean.

    moved >= Σ over arguments of reads · bytes + (trainable + optimizer) + 2 · min(residuals, temporaries)

are the bytes that pass a device's memory in a step: what is read (`peftjax.planner.reads`), what is written
over the trainable and the optimizer's state, and the residuals, written and read once each. What one layer
writes and reads while it works, and weights gathered from other devices, are left out: they may never leave
the chip.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import optax
from jax.sharding import Mesh, Sharding, SingleDeviceSharding

from peftjax import losses
from peftjax.backbone.backbone import Backbone
from peftjax.core import compat, tree
from peftjax.interpreter import adapt
from peftjax.parallel.mesh import find_mesh
from peftjax.parallel.placement import batch_shardings, state_shardings
from peftjax.parallel.rules import Rules
from peftjax.planner.between import peaks_between
from peftjax.planner.collectives import by_kind
from peftjax.planner.compiling import compile_for
from peftjax.planner.flops import Flops, count_flops
from peftjax.planner.machine import Machine, find_machine
from peftjax.planner.reads import count_reads
from peftjax.planner.residuals import kept_arrays, nbytes
from peftjax.planner.result import Bytes, Plan
from peftjax.planner.roofline import roofline
from peftjax.planner.sizes import device_bytes
from peftjax.planner.specification import find_specification
from peftjax.train.paging import OptimizerMemory, is_paged
from peftjax.train.step import Training, TrainingState, divided, training
from peftjax.transform.frozen import Params
from peftjax.transform.transform import Forward, Transform

Loss = Callable[[Any, Any], jax.Array]
"""`(outputs, batch) -> scalar`."""


def method_loss(method: Transform, model: Forward, loss: Loss) -> Callable[[Params, Any], jax.Array]:
    """`(params, batch) -> loss` of the rewritten model."""
    forward = adapt(method.model(model))
    return lambda params, batch: loss(forward(params, batch), batch)


def plan(
    method: Transform,
    model: Forward,
    params: Params,
    batch: Any,
    *,
    optimizer: optax.GradientTransformation,
    loss: Loss = losses.cross_entropy,
    target: str = "cpu",
    optimizer_memory: OptimizerMemory = "device",
    mesh: str | None = None,
    rules: Rules | None = None,
) -> Plan:
    """Compile one training step of `method` for `target` and read what it needs.

    The step is that of `pj.training`, with nothing random in it (no dropout). The weights of a method in
    place hold the trained values; writing them is a program of its own and not in the plan. A method's
    advances are compiled too.

    Args:
        method: the method.
        model: `(params, batch) -> outputs`.
        params: the parameters, or their shapes (`jax.eval_shape(model.init, key)`); their dtypes are those
            the device will hold.
        batch: a batch, or its shapes.
        optimizer: any of optax.
        loss: `(outputs, batch) -> scalar`.
        target: "cpu", "h200", "h100", "h200:8" (of one host), or a TPU topology such as "v5e:2x2", of which
            without a mesh one device is meant; see `peftjax.planner.machine` for the compilers they need.
        optimizer_memory: where the optimizer's state lies between steps, as in `pj.training`.
        mesh: of all devices of the target, such as "fsdp=8,tensor=2", or "all" on fsdp, as of
            `pj.parallel.make_mesh`; None is one device. Of a `Backbone` the activations lie on it too.
        rules: where parameters lie on the mesh, by default as of `pj.parallel.shard`.

    Raises:
        DoesNotFit: a TPU's compiler refuses the step as too large for its memory, or what is done between
            steps. (A GPU's compiles it, and `Plan.fits` is False.)
        PeftError: the mesh does not fit the target's devices; the target is unknown, its compiler is missing,
            or it cannot compile the step.
    """
    machine = find_machine(target)
    on = find_mesh(mesh, machine.devices)
    if on is not None and isinstance(model, Backbone):
        model = replace(model, mesh=on)
    run = training(method, method_loss(method, model, loss), optimizer, optimizer_memory=optimizer_memory)
    trainable, state, frozen, batch = _input_shapes(run, params, batch, machine, on, rules)
    inputs = trainable, state, *divided(frozen, run.moves), batch
    step = partial(run.run_step, key=None)
    traced = jax.jit(step, donate_argnums=(0, 1, 2), keep_unused=True).trace(*inputs)
    flops = count_flops(traced.jaxpr, machine.platform)
    begun, opened = jax.eval_shape(method.begin, frozen, trainable)

    def loss_fn(trainable: Any, frozen: Any, batch: Any) -> jax.Array:
        return run.loss(method.apply(frozen, trainable), batch)

    kept = nbytes(kept_arrays(loss_fn, opened, begun, batch))
    start = time.perf_counter()
    compiled = compile_for(machine, traced, f"{method.name} on {target}: the compiler refuses the step")
    seconds = time.perf_counter() - start
    between = peaks_between(run, (trainable, state, frozen, batch), machine, on)
    found = _read(run, machine, opened, inputs, compiled, kept, flops, seconds, between)
    if on is not None:
        text = compat.text_of(compiled)
        found = replace(found, devices=on.size, collectives=None if text is None else by_kind(text))
    items, unit = _items(batch)
    moved = _moved(found, count_reads(traced.jaxpr, machine.platform), inputs, compiled)
    found = replace(found, items=items, unit=unit, moved=moved)
    device = find_specification(target)
    if device is None:
        return found
    found = replace(found, capacity=device.memory)
    if found.collectives is None:
        return found
    return replace(found, roofline=roofline(device, flops, moved, found.collectives.values(), found.devices))


def _items(batch: Any) -> tuple[int, str]:
    """What a step is of: tokens where the batch has some, else rows."""
    if isinstance(batch, Mapping) and "input_ids" in batch:
        return math.prod(batch["input_ids"].shape), "tokens"
    return next((leaf.shape[0] for leaf in jax.tree.leaves(batch) if leaf.shape), 0), "rows"


def _moved(found: Plan, reads: list[int], inputs: tuple, compiled: Any) -> int:
    """The bytes that pass a device's memory in a step, at least; a state from the host passes it too."""
    leaves = zip(reads, jax.tree.leaves(inputs), jax.tree.leaves(compiled.input_formats[0]), strict=True)
    read = sum(count * device_bytes([leaf], [held]) for count, leaf, held in leaves)
    residuals = min(found.kept // found.devices, found.bytes.temporaries)
    return read + found.bytes.trainable + found.bytes.optimizer + 2 * residuals


def _input_shapes(
    run: Training, params: Params, batch: Any, machine: Machine, mesh: Mesh | None, rules: Rules | None
) -> tuple[Any, Any, Any, Any]:
    """Shapes of trainable, optimizer state, frozen and batch, on the target's device or its mesh."""
    key = jax.eval_shape(jax.random.key, 0)
    frozen, trainable = jax.eval_shape(lambda *given: run.method.close(*run.method.init(*given)), key, params)
    frozen = replace(frozen, advanced=True)
    state = jax.eval_shape(lambda *given: run.tx.init(run.method.begin(*given)[1]), frozen, trainable)
    if mesh is None:
        place = SingleDeviceSharding(machine.device)
        places = jax.tree.map(lambda _: place, (trainable, state, frozen, batch))
    else:
        whole = state_shardings(TrainingState(0, frozen, trainable, state, key), mesh, rules)
        places = whole.trainable, whole.opt_state, whole.frozen, batch_shardings(batch, mesh)
    trainable, state, frozen, batch = jax.tree.map(_placed, (trainable, state, frozen, batch), places)
    state = jax.tree.map(
        lambda leaf: (
            _placed(leaf, leaf.sharding.with_memory_kind("pinned_host"))
            if is_paged(leaf, run.optimizer_memory)
            else leaf
        ),
        state,
    )
    return trainable, state, frozen, batch


def _placed(leaf: Any, place: Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)


def _read(
    run: Training,
    machine: Machine,
    trained: Any,
    inputs: tuple,
    compiled: Any,
    kept: int,
    flops: Flops,
    seconds: float,
    between: tuple[int, ...],
) -> Plan:
    found = compiled.memory_analysis()
    on_host = found.host_argument_size_in_bytes  # none of a CPU, which has one memory
    trainable, state, moved, fixed, batch = zip(inputs, compiled.input_formats[0])
    frozen = [replace(part, **own) for part, own in zip(fixed, moved)]
    sizes = Bytes(
        weights=device_bytes(*(part.params for part in frozen)),
        method_state=device_bytes(*(part.state for part in frozen)),
        trainable=device_bytes(*trainable),
        optimizer=device_bytes(*_on_device(state, run.optimizer_memory if on_host else "device")),
        batch=device_bytes(*batch),
        arguments=found.argument_size_in_bytes,
        temporaries=found.temp_size_in_bytes,
        outputs=found.output_size_in_bytes,
        aliased=found.alias_size_in_bytes,
        code=found.generated_code_size_in_bytes,
        host=found.host_temp_size_in_bytes + on_host,
    )
    return Plan(
        method=run.method.name,
        target=machine.name,
        device=machine.device.device_kind,
        bytes=sizes,
        kept=kept,
        flops=flops.total,
        uncounted=flops.uncounted,
        trainable_parameters=tree.count(trained),
        compile_seconds=seconds,
        between=between,
    )


def _on_device(pair: tuple[Any, Any], memory: OptimizerMemory) -> tuple[list[Any], list[Any]]:
    """Shapes and formats of an optimizer's state without what is paged out."""
    held = [both for both in zip(*map(jax.tree.leaves, pair)) if not is_paged(both[0], memory)]
    return [shape for shape, _ in held], [form for _, form in held]
