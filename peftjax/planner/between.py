"""The memory of the programs by which a method advances before a step."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from peftjax.planner.compiling import compile_for
from peftjax.planner.machine import Machine
from peftjax.train.step import ADVANCED, Training, divided
from peftjax.transform.transform import Advance


def peaks_between(
    run: Training, inputs: tuple[Any, Any, Any, Any], machine: Machine, mesh: Mesh | None = None
) -> tuple[int, ...]:
    """The device memory that each part of each advance needs, in bytes.

    Args:
        run: the training.
        inputs: shapes of trainable, optimizer state, frozen and batch on the machine.
        machine: what to compile for.
        mesh: where the shapes lie, if not on one device.

    Raises:
        PeftError: the machine's compiler refuses one.
    """
    method, (trainable, state, frozen, batch) = run.method, inputs
    moved, fixed = divided(frozen, ADVANCED)
    place = SingleDeviceSharding(machine.device) if mesh is None else NamedSharding(mesh, PartitionSpec())
    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=place)

    def peak(advance: Advance, part: int) -> int:
        def advanced(*given: Any) -> tuple[Any, ...]:
            key = jax.random.fold_in(jax.random.key(0), given[-1])
            return run.run_advance(advance, *given, key, part=part)

        program = jax.jit(advanced, donate_argnums=(0, 1, 2))
        refused = f"{method.name} on {machine.name}: the compiler refuses what is done before a step"
        traced = program.trace(trainable, state, moved, fixed, batch, count)
        found = compile_for(machine, traced, refused).memory_analysis()
        new = found.output_size_in_bytes - found.alias_size_in_bytes
        return found.argument_size_in_bytes + found.temp_size_in_bytes + new

    return tuple(peak(one, part) for one in method.advances for part in range(one.parts(frozen)))
