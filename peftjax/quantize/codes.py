"""What every codec gives: an array as codes."""

import abc
from typing import Any

from jax import Array


class Codes(abc.ABC):
    """An array as codes and what tells their values; it has the shape and dtype of what it decodes to."""

    codes: Array
    dtype: Any

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The array's shape."""

    @abc.abstractmethod
    def decode(self) -> Array:
        """The array that the codes stand for."""


def decode(x: Codes | Array) -> Array:
    """The array that codes stand for; an array is itself."""
    return x.decode() if isinstance(x, Codes) else x
