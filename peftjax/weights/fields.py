"""The fields of a structured weight, by role, so that views of it need no code of their own.

- `logical()`: an array or weight of the logical shape (the base);
- `canonical(side)`: an array with the canonical stack axes first; its last axis runs over the inputs
  ('i'), the outputs ('o') or neither (None): factors, magnitudes, keys;
- `random_key()`: keys for dropout, with the canonical stack axes;
- `static()`: a Python value that is part of the compiled program.
"""

from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import jax

from peftjax.weights.layout import Side

C = TypeVar("C", bound=type)


def logical() -> Any:
    """A field that holds an array, or a weight, of the logical shape."""
    return field(metadata={"role": "logical"})


def canonical(side: Side | None = None, default: Any = ...) -> Any:
    """A field that holds an array `[*stack, ...]`, or None, and what its last axis runs over."""
    metadata = {"role": "canonical", "side": side}
    return field(metadata=metadata) if default is ... else field(default=default, metadata=metadata)


def random_key() -> Any:
    """A field that holds keys `[*stack]` for dropout, or None."""
    return field(default=None, metadata={"role": "canonical", "side": None, "random": True})


def static(default: Any = ...) -> Any:
    """A field that holds a hashable Python value."""
    metadata = {"role": "static"}
    return field(metadata=metadata) if default is ... else field(default=default, metadata=metadata)


def structured(cls: C) -> C:
    """Make a subclass of `Weight` a frozen dataclass and a pytree whose static fields are metadata."""
    cls = dataclass(frozen=True, eq=False)(cls)
    meta = [f.name for f in fields(cls) if f.metadata["role"] == "static"]
    data = [f.name for f in fields(cls) if f.metadata["role"] != "static"]
    return jax.tree_util.register_dataclass(cls, data_fields=data, meta_fields=meta)
