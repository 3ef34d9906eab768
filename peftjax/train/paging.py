"""Where an optimizer's state lies between steps: on the device, or paged out to the host's pinned memory.

A step brings it to the device for the update and takes it back; what is computed stays the same.
"""

from typing import Any, Literal

import jax

OptimizerMemory = Literal["device", "pinned_host"]
"""Where the state lies between steps."""


def is_paged(leaf: Any, memory: OptimizerMemory) -> bool:
    """Whether an array of the state leaves the device; single numbers, such as counts, stay."""
    return memory == "pinned_host" and leaf.ndim > 0


def paged_in(opt_state: Any, memory: OptimizerMemory) -> Any:
    """The state on the device, where an update reads it."""
    return _moved(opt_state, memory, jax.memory.Space.Device)


def paged_out(opt_state: Any, memory: OptimizerMemory) -> Any:
    """The state where it lies between steps."""
    return _moved(opt_state, memory, jax.memory.Space.Host)


def _moved(opt_state: Any, memory: OptimizerMemory, to: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.device_put(leaf, to) if is_paged(leaf, memory) else leaf, opt_state)
