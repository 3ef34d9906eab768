"""The options of a method as they stand in a file or on the command line, checked before it is made."""

import inspect
import math
from collections.abc import Callable, Mapping
from functools import reduce
from operator import or_
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import jax

from peftjax.core.errors import PeftError
from peftjax.core.tree import nearest
from peftjax.io.files import checked
from peftjax.methods.lowrank.lora import lora
from peftjax.transform.transform import Transform

_LARGEST = 1_000_000
"""Of whole numbers: ranks, widths and layers are below it, and no memory is asked for more."""
_COUNTS = ("total_steps", "every", "reselect_at", "allocate_every", "init_warmup", "final_warmup")
_COUNTS += ("freeze_steps", "indices")
"""Options that count steps or rows, which may be as many as 32 bits hold."""
_LARGEST_FLOAT = 1e9
_DEEPEST = 40
"""Levels of lists and mappings in a configuration: no more than functions can follow."""


def check_options(name: str, factory: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Raise a PeftError for an option that the factory does not have, or a value that it cannot have.

    Args:
        name: the method's.
        factory: makes it; its annotations say what each option can be. What it takes by `**options` are
            options of `lora`.
        options: values of JSON or YAML.
    """
    parameters = inspect.signature(factory).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    hints = {**(get_type_hints(lora) if takes_any else {}), **get_type_hints(factory)}
    for option, value in options.items():
        if option not in parameters and not takes_any:
            raise PeftError(
                f"{name}: unknown option {option!r}; closest: {nearest(option, parameters) or 'it has none'}"
            )
        if option in hints:  # an unknown one of `lora` is named by itself
            _check(f"{name}: option {option!r}", option, _of_file(hints[option]), value)
    for option, parameter in parameters.items():
        needed = parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
        if needed and option not in options:
            raise PeftError(f"{name}: the option {option!r} is missing")


def require_shallow(config: Any) -> None:
    """Raise a PeftError where a configuration has methods in methods without an end."""
    left = [(config, 0)]
    while left:
        value, depth = left.pop()
        if depth > _DEEPEST:
            raise PeftError("the method's configuration nests too deeply")
        inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
        left += [(one, depth + 1) for one in inner]


def _check(where: str, option: str, hint: Any, value: Any) -> None:
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            choices = ", ".join(map(repr, get_args(hint)))
            raise PeftError(f"{where} is {_shown(value)}, and can be {choices}")
        return
    checked(hint, value, where)
    largest = 2**31 - 1 if option in _COUNTS else _LARGEST
    for number in _numbers(value):
        if isinstance(number, float):
            if not math.isfinite(number) or abs(number) > _LARGEST_FLOAT:
                raise PeftError(f"{where} has {number}; numbers are finite and at most {_LARGEST_FLOAT:g}")
        elif abs(number) > largest:
            raise PeftError(f"{where} has {_shown(number)}; whole numbers are at most {largest:,}")


def _of_file(hint: Any) -> Any:
    """The part of an annotation that a value of JSON can be: no arrays, no methods."""
    if get_origin(hint) not in (Union, UnionType):
        return hint
    kept = [part for part in get_args(hint) if part is not Transform and jax.Array not in get_args(part)]
    return reduce(or_, kept)


def _numbers(value: Any) -> list[int | float]:
    """The numbers in a value of one level of lists or mappings."""
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else [value]
    return [one for one in inner if isinstance(one, int | float) and not isinstance(one, bool)]


def _shown(value: Any) -> str:
    text = str(value) if isinstance(value, int) and abs(value) < 2**64 else repr(value)[:60]
    return text if len(text) <= 60 else text[:57] + "..."
