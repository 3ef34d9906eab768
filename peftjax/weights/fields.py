"""The fields of a structured weight, by role, so that views of it need no code of their own.

- `logical()`: an array or weight of the logical shape (the base);
- `canonical(side)`: an array with the canonical stack axes first; its last axis runs over the inputs
  ('i'), the outputs ('o') or neither (None): factors, magnitudes, keys;
- `stacked()`: a pytree of arrays with the canonical stack axes first, such as codes or the numbers of a map;
- `shared()`: a pytree of arrays without stack axes, which every matrix of the stack uses;
- `random_key()`: keys for dropout, with the canonical stack axes;
- `static()`: a Python value that is part of the compiled program;
- `tuple_of_parts()`: arrays and weights of other axes, whose views the weight takes itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar, dataclass_transform

import jax
from jax import Array

from peftjax.weights.layout import Side

T = TypeVar("T")
Slots = Mapping[str, Array]
"""The arrays of a weight by name, `[*stack, ...]`."""


def logical() -> Any:
    """A field that holds an array, or a weight, of the logical shape."""
    return field(metadata={"role": "logical"})


def canonical(side: Side | None = None, *, default: Any = ...) -> Any:
    """A field that holds an array `[*stack, ...]`, or None, and what its last axis runs over."""
    metadata = {"role": "canonical", "side": side}
    return field(metadata=metadata) if default is ... else field(default=default, metadata=metadata)


def stacked() -> Any:
    """A field that holds a pytree of arrays `[*stack, ...]` that belong to whole matrices."""
    return field(metadata={"role": "stacked"})


def shared(*, default: Any = ...) -> Any:
    """A field that holds a pytree of arrays that all matrices of the stack use."""
    metadata = {"role": "shared"}
    return field(metadata=metadata) if default is ... else field(default=default, metadata=metadata)


def random_key(*, default: None) -> Any:
    """A field that holds keys `[*stack]` for dropout, or None."""
    return field(default=default, metadata={"role": "canonical", "side": None, "random": True})


def static(*, default: Any = ...) -> Any:
    """A field that holds a hashable Python value."""
    metadata = {"role": "static"}
    return field(metadata=metadata) if default is ... else field(default=default, metadata=metadata)


def tuple_of_parts() -> Any:
    """A field that holds a tuple of arrays and weights of other axes than the logical ones."""
    return field(metadata={"role": "parts"})


@dataclass_transform(
    eq_default=False,
    field_specifiers=(logical, canonical, stacked, shared, random_key, static, tuple_of_parts),
)
def structured(cls: type[T]) -> type[T]:
    """Make a subclass of `Weight` a frozen dataclass and a pytree whose static fields are metadata."""
    made: Any = dataclass(frozen=True, eq=False)(cls)
    meta = [f.name for f in fields(made) if f.metadata["role"] == "static"]
    data = [f.name for f in fields(made) if f.metadata["role"] != "static"]
    return jax.tree_util.register_dataclass(made, data_fields=data, meta_fields=meta)
