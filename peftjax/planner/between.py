"""What the programs need that a method runs between two steps."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from peftjax.interpreter import adapt
from peftjax.planner.compiling import compile_for
from peftjax.planner.machine import Machine
from peftjax.transform.transform import Forward, Renewal, Transform


def peaks_between(
    method: Transform,
    model: Forward,
    loss: Callable[[Any, Any], jax.Array],
    inputs: tuple[Any, Any, Any, Any],
    machine: Machine,
) -> tuple[int, ...]:
    """The device memory that each part of each renewal needs, in bytes.

    Args:
        method: the method.
        model: `(params, batch) -> outputs`.
        loss: `(outputs, batch) -> scalar`.
        inputs: shapes of trainable, optimizer state, frozen and batch on the machine.
        machine: what for.

    Raises:
        PeftError: the machine's compiler refuses one.
    """
    forward, frozen = adapt(method.model(model)), inputs[2]
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=SingleDeviceSharding(machine.device))

    def renew(
        renewal: Renewal, part: int, trainable: Any, state: Any, frozen: Any, batch: Any, step: Any
    ) -> tuple[Any, Any]:
        def of_batch(params: Any) -> jax.Array:
            return loss(forward(params, batch), batch)

        key = jax.random.fold_in(jax.random.key(0), step)
        return renewal.run(of_batch, frozen, trainable, state, step=step, key=key, part=part)

    def peak(renewal: Renewal, part: int) -> int:
        program = jax.jit(partial(renew, renewal, part), donate_argnums=(0, 1))
        refused = f"{method.name} on {machine.name}: the compiler refuses what is done between steps"
        found = compile_for(machine, program.trace(*inputs, step), refused).memory_analysis()
        new = found.output_size_in_bytes - found.alias_size_in_bytes
        return found.argument_size_in_bytes + found.temp_size_in_bytes + new

    return tuple(peak(r, part) for r in method.renewals for part in range(r.parts(frozen)))
