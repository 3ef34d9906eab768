"""What a method keeps fixed in a step."""

from dataclasses import dataclass, field
from typing import Any

import jax

Params = Any
Trainable = Any
State = Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Frozen:
    """What a method keeps fixed in a step: a pytree to pass through `jit` beside the trainable.

    Attributes:
        params: the parameters, with a `Hole` where a plain leaf is trained.
        state: arrays of the method's own, of any dtype, by parameter path: indices, projectors, pools, whole
            weights that it changes. Only its `advance` changes them.
        plan: the method's static decisions (which leaf, which axes, which rank), hashable.
        advanced: False until the first `advance` of a method that has any.
    """

    params: Params
    state: State = field(default_factory=dict)
    plan: Any = field(default=(), metadata={"static": True})
    advanced: bool = field(default=True, metadata={"static": True})
