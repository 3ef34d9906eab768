"""A traced program compiled for a machine that need not be there."""

import re
from typing import Any

import jax

from peftjax.core.errors import PeftError
from peftjax.planner.machine import Machine

_REFUSED = "RESOURCE_EXHAUSTED"
_USED = re.compile(r"\(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class DoesNotFit(PeftError):
    """A program needs more memory than the device has, as its compiler says.

    Attributes:
        needed: bytes, where the compiler names them.
        capacity: bytes that a program can have, likewise.
    """

    def __init__(self, text: str, needed: int | None = None, capacity: int | None = None) -> None:
        super().__init__(text)
        self.needed, self.capacity = needed, capacity


def compile_for(machine: Machine, traced: Any, refused: str) -> Any:
    """The compiled program of `jax.jit(...).trace(...)`.

    Args:
        machine: what to compile for.
        traced: the program.
        refused: the beginning of the error.

    Raises:
        DoesNotFit: the compiler refuses it as too large, as a TPU's does.
        PeftError: the compiler refuses it for another reason.
    """
    lowered = traced.lower(lowering_platforms=(machine.platform,))
    try:
        return lowered.compile(compiler_options=dict(machine.options))
    except jax.errors.JaxRuntimeError as error:
        text = f"{refused}: {str(error).splitlines()[0]}"
        if _REFUSED not in str(error):
            raise PeftError(text) from error
        sizes = _USED.search(str(error))
        if sizes is None:
            raise DoesNotFit(text) from error
        needed, capacity = (int(float(sizes[n]) * _UNITS[sizes[n + 1]]) for n in (1, 3))
        raise DoesNotFit(text, needed, capacity) from error
