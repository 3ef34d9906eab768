"""Which implementation an operation takes, decided where it is known: when a program is lowered.

`auto`: the Mosaic kernels on a TPU and the Triton kernels on an NVIDIA GPU, in a program for one device or
in a device's own code (`shard_map`); the reference on a CPU and in a program that XLA partitions, which it
can do with jnp but not with a kernel. The program's platform and devices decide, not the machine's, so a
program compiled ahead of time gets the kernels of its topology. Under `jax.export` it is the reference:
a stored program must run with later versions, which the code of a kernel does not promise.

`pallas`: the kernels everywhere, on a CPU the Mosaic ones interpreted; JAX refuses a partitioned program.
`reference`: jnp everywhere, and so under mesh axes of type Explicit, whose shardings are part of the types.

Each operation is a JAX primitive with these lowerings, inside the custom gradient: forward and backward
choose separately, and vmap makes a longer stack.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import jax
from jax.sharding import AxisType

from peftjax.core import primitives
from peftjax.core.errors import PeftError
from peftjax.kernels.kernelized_merge import fused, gpu, reference, tpu

Implementation = Literal["auto", "reference", "pallas"]


def check(implementation: str) -> None:
    """Raise `PeftError` for a name that is none."""
    if implementation not in get_args(Implementation):
        names = ", ".join(get_args(Implementation))
        raise PeftError(f"implementation is {implementation!r}; it must be one of {names}.")


def _operation(name: str) -> Callable[..., Any]:
    """`reference.<name>` or `fused.<name>` as chosen: `(*operands, kernel_function, implementation)`."""
    plain = getattr(reference, name)
    with_kernels = {
        platform: partial(_flat, partial(getattr(fused, name), run))
        for platform, run in (("tpu", tpu.run), ("cuda", gpu.run))
    }
    interpreted = partial(_flat, partial(getattr(fused, name), partial(tpu.run, interpret=True)))
    title = f"kernelized_merge_{name}"
    bind = {
        "auto": primitives.by_platform(title, partial(_flat, plain), with_kernels),
        "pallas": primitives.by_platform(f"{title}_pallas", interpreted, with_kernels, always=True),
    }

    def operation(*operands: Any, kernel_function: Any, implementation: Implementation) -> Any:
        if implementation == "reference" or (implementation == "auto" and _has_explicit_axes(operands)):
            return plain(*operands, kernel_function)
        leaves, structure = jax.tree.flatten(operands)
        out = jax.tree.structure(jax.eval_shape(partial(plain, kernel_function=kernel_function), *operands))
        return jax.tree.unflatten(
            out, bind[implementation](*leaves, structure=structure, kernel_function=kernel_function)
        )

    return operation


def _flat(f: Callable[..., Any], *leaves: Any, structure: Any, kernel_function: Any) -> list[Any]:
    return jax.tree.leaves(f(*jax.tree.unflatten(structure, leaves), kernel_function))


def _has_explicit_axes(operands: Any) -> bool:
    meshes = [jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves(operands)]
    return any(AxisType.Explicit in mesh.axis_types for mesh in meshes)


forward = _operation("forward")
backward = _operation("backward")
threshold = _operation("threshold")
