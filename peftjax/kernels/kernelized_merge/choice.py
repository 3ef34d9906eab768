"""Which implementation an operation takes, decided where it is known: when a program is lowered.

`auto`: the Mosaic kernels on a TPU and the Triton kernels on an NVIDIA GPU, in a program for one device or
in a device's own code (`shard_map`); the reference on a CPU, and wherever XLA is to partition the
program, which it can do with jnp but not with a kernel. It is the platform and the device count of the
program that count, not the machine's: a program compiled ahead of time for another topology has that
topology's kernels. Each operation is a primitive of JAX with these lowerings. The custom gradient lies
around it, so that forward and backward choose on their own, and vmap makes a longer stack.

`pallas`: the kernels everywhere, on a CPU the Mosaic ones interpreted; a program that XLA is to partition
is then an error of JAX. `reference`: jnp everywhere.

`jax.export` gets the reference under `auto`, for one platform or several: a stored program must run with
later versions, and the code of a kernel promises nothing of that kind.

Mesh axes of type Explicit always take the reference: they are known while tracing, and shardings are
then part of the types.
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
