"""A traced program compiled for a machine that need not be there."""

from typing import Any

import jax

from peftjax.core.errors import PeftError
from peftjax.planner.machine import Machine


def compile_for(machine: Machine, traced: Any, refused: str) -> Any:
    """The compiled program of `jax.jit(...).trace(...)`.

    Args:
        machine: what to compile for.
        traced: the program.
        refused: the beginning of the error.

    Raises:
        PeftError: the compiler refuses it, as a TPU's does when it does not fit.
    """
    lowered = traced.lower(lowering_platforms=(machine.platform,))
    try:
        return lowered.compile(compiler_options=dict(machine.options))
    except jax.errors.JaxRuntimeError as error:
        raise PeftError(f"{refused}: {str(error).splitlines()[0]}") from error
