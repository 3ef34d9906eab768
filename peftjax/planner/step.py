"""What a training step needs, asked of the real compiler from shapes alone: no weights, no hardware.

    arguments  = weights + method state + trainable + optimizer + batch
    peak       = arguments + temporaries + (outputs - aliased)

`aliased` are the outputs written over a donated argument: the new trainable and optimizer state. Gradients
and the residuals of the backward pass are among the temporaries: the most that is needed at one time, as XLA
shares buffers between values that do not live together. The numbers are those of
`compiled.memory_analysis()`; `docs/guides/memory.md` says what each compiler's mean.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
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
from peftjax.planner.collectives import Traffic, by_kind
from peftjax.planner.compiling import compile_for
from peftjax.planner.flops import Flops, count_flops
from peftjax.planner.machine import Machine, find_machine
from peftjax.planner.residuals import kept_arrays, nbytes
from peftjax.train.paging import OptimizerMemory, is_paged
from peftjax.train.step import Training, TrainingState, divided, training
from peftjax.transform.frozen import Params
from peftjax.transform.transform import Forward, Transform

Loss = Callable[[Any, Any], jax.Array]
"""`(outputs, batch) -> scalar`."""


@dataclass(frozen=True)
class Bytes:
    """Where a step's memory goes, in bytes of the device, its layout's filling included.

    Attributes:
        weights: the frozen parameters.
        method_state: what else the method holds: indices, a frozen factor, weights that its advance changes.
        trainable: what is trained.
        optimizer: the optimizer's state, as far as it is on the device.
        batch: the batch.
        arguments: all of the above, as the compiler counts it.
        temporaries: what the step holds while it works, gradients and residuals included.
        outputs: all that the step returns.
        aliased: the part of `outputs` that is written over a donated argument.
        code: the program, where it lies in the device's memory (TPU); not in `peak`.
        host: what lies in the host's memory, where a policy such as "offload_attention" puts temporaries and
            `optimizer_memory` the optimizer's state; not in `peak`.
    """

    weights: int
    method_state: int
    trainable: int
    optimizer: int
    batch: int
    arguments: int
    temporaries: int
    outputs: int
    aliased: int
    code: int
    host: int

    @property
    def peak(self) -> int:
        """The device memory that one step needs."""
        return self.arguments + self.temporaries + self.outputs - self.aliased


@dataclass(frozen=True)
class Plan:
    """What a step needs on a target; `str` is a table.

    Attributes:
        method: the method's name.
        target: the target's name.
        device: the device's own name.
        bytes: memory by kind.
        kept: the residuals of the backward pass, as traced, without the step's own inputs: activations, in
            bytes. `bytes.temporaries` has them too, and what one layer needs while it works.
        flops: of the products of one step, what is recomputed included; see `peftjax.planner.flops`.
        uncounted: operations that `flops` leaves out.
        trainable_parameters: how many numbers are trained.
        compile_seconds: what the compiler took for the step.
        between: the peaks of the programs that the method runs before a step (its advances), each counted as
            that of the step.
        devices: of the mesh; `bytes` are those of one of them, `kept` and `flops` those of all.
        collectives: what passes between them, by kind; empty, with a warning, where this jax cannot read the
            program of a newer compiler.
    """

    method: str
    target: str
    device: str
    bytes: Bytes
    kept: int
    flops: int
    uncounted: tuple[str, ...]
    trainable_parameters: int
    compile_seconds: float
    between: tuple[int, ...] = ()
    devices: int = 1
    collectives: Mapping[str, Traffic] = field(default_factory=dict)

    def __str__(self) -> str:
        sizes = self.bytes
        rows = [
            ("weights", sizes.weights),
            ("method state", sizes.method_state),
            ("trainable", sizes.trainable),
            ("optimizer", sizes.optimizer),
            ("batch", sizes.batch),
            ("temporaries", sizes.temporaries),
            ("  kept for backward", self.kept),
            ("outputs not aliased", sizes.outputs - sizes.aliased),
            ("peak", sizes.peak),
            *((("peak between steps", max(self.between)),) if self.between else ()),
            ("code, on top", sizes.code),
            ("on the host", sizes.host),
        ]
        where = self.device if self.devices == 1 else f"{self.devices} x {self.device}, each"
        left_out = f", without {', '.join(self.uncounted)}" if self.uncounted else ""
        return "\n".join(
            [
                f"{self.method} on {self.target} ({where}), {self.trainable_parameters:,} trained",
                *(f"  {name:<20}{size / 2**20:>12,.2f} MiB" for name, size in rows),
                *(
                    f"  {kind:<20}{traffic.nbytes / 2**20:>12,.2f} MiB in {traffic.runs:,}"
                    for kind, traffic in self.collectives.items()
                ),
                f"  {'FLOPs a step':<20}{self.flops:>12.4g}{left_out}",
                f"  {'compiled in':<20}{self.compile_seconds:>12.1f} s",
            ]
        )


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
        target: "cpu", "h200", "h100" or one chip of a TPU topology such as "v5e:2x2"; see
            `peftjax.planner.machine` for the compilers they need.
        optimizer_memory: where the optimizer's state lies between steps, as in `pj.training`.
        mesh: of all devices of the target, such as "fsdp=8,tensor=2", or "all" on fsdp, as of
            `pj.parallel.make_mesh`; None is one device. Of a `Backbone` the activations lie on it too.
        rules: where parameters lie on the mesh, by default as of `pj.parallel.shard`.

    Raises:
        PeftError: the mesh does not fit the target's devices;
            the target is unknown, its compiler is missing, or it cannot compile the step: a TPU's
            says so when the step does not fit.
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
    between = peaks_between(run, (trainable, state, frozen, batch), machine)
    found = _read(run, machine, opened, inputs, compiled, kept, flops, seconds, between)
    if on is None:
        return found
    return replace(found, devices=on.size, collectives=by_kind(compat.text_of(compiled) or ""))


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
        weights=_device_bytes(*(part.params for part in frozen)),
        method_state=_device_bytes(*(part.state for part in frozen)),
        trainable=_device_bytes(*trainable),
        optimizer=_device_bytes(*_on_device(state, run.optimizer_memory if on_host else "device")),
        batch=_device_bytes(*batch),
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


def _device_bytes(shapes: Any, formats: Any) -> int:
    """The bytes of arrays in the compiled program's layouts."""
    total = 0
    for leaf, held in zip(jax.tree.leaves(shapes), jax.tree.leaves(formats)):
        own = jax.ShapeDtypeStruct(held.sharding.shard_shape(leaf.shape), leaf.dtype)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            own = jax.eval_shape(jax.random.key_data, own)
        total += math.prod(compat.padded_shape(own.shape, held.layout)) * own.dtype.itemsize
    return total
