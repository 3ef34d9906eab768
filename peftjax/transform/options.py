"""The options of a method: those of a family as keywords, and how they stand in a file."""

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from functools import reduce
from operator import or_
from types import UnionType
from typing import Any, Literal, ParamSpec, Protocol, TypeVar, Union, get_args, get_origin, get_type_hints

import jax

from peftjax.core.errors import PeftError
from peftjax.core.tree import nearest
from peftjax.io.files import checked
from peftjax.transform.transform import Transform

Keywords = ParamSpec("Keywords")


class Checked(Protocol):
    """Options that can be checked."""

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for an option out of range."""


Options = TypeVar("Options", bound=Checked)

_LARGEST = 1_000_000
"""The bound of whole numbers: ranks, widths and layers are below it, so that no array outgrows memory."""
_COUNTS = ("total_steps", "every", "reselect_at", "allocate_every", "init_warmup", "final_warmup")
_COUNTS += ("freeze_steps", "indices", "seed", "counts")
"""Options that count steps or rows, and seeds, which may be as many as 32 bits hold."""
_LARGEST_FLOAT = 1e9
_DEEPEST = 40
"""The most levels of lists and mappings in a configuration, well within Python's limit of recursion."""


def takes(
    options: Callable[Keywords, Options],
) -> Callable[[Callable[[Options], Transform]], Callable[Keywords, Transform]]:
    """Give a factory the fields of a frozen dataclass as keywords: a family's options, defined once.

    `inspect.signature`, type checkers and `help` show the fields with their types, defaults and descriptions.
    The factory is given options that have been checked.

    Args:
        options: the dataclass, all fields by keyword, each described under `Attributes:` of its class.

    Raises:
        PeftError: in a call of the factory, for an option that it does not have or a value out of range.
    """
    signature = inspect.signature(options)

    def decorate(make: Callable[[Options], Transform]) -> Callable[Keywords, Transform]:
        name = make.__name__

        @functools.wraps(make)
        def factory(*args: Keywords.args, **given: Keywords.kwargs) -> Transform:
            for option in given:
                if option not in signature.parameters:
                    close = nearest(option, signature.parameters)
                    raise PeftError(f"{name}: unknown option {option!r}; did you mean {close}?")
            made = options(*args, **given)
            made.require_valid(name)
            return make(made)

        factory.__doc__ = _with_fields(make, options)
        factory.__annotations__ = {**get_type_hints(options), "return": Transform}
        factory.__signature__ = signature.replace(return_annotation=Transform)  # type: ignore[attr-defined]
        return factory

    return decorate


def _with_fields(make: Callable[..., Any], options: Any) -> str:
    """The factory's docstring with the fields of the options as its arguments."""
    fields = [inspect.cleandoc(kind.__dict__.get("__doc__") or "") for kind in reversed(options.__mro__)]
    described = [line for text in fields for line in text.partition("Attributes:\n")[2].splitlines()]
    head, raises, tail = inspect.cleandoc(make.__doc__ or "").partition("Raises:\n")
    return "\n".join([head.rstrip(), "", "Args:", *described, "", raises + tail]).rstrip()


def check_options(name: str, factory: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Raise a PeftError for an option that the factory does not have, or a value that it cannot have.

    Args:
        name: the method's.
        factory: makes it; its annotations say what each option can be.
        options: values of JSON or YAML, and methods.
    """
    parameters = inspect.signature(factory).parameters
    hints = get_type_hints(factory)
    for option, value in options.items():
        if option not in parameters:
            raise PeftError(
                f"{name}: unknown option {option!r}; closest: {nearest(option, parameters) or 'it has none'}"
            )
        if not isinstance(value, Transform):
            _check(f"{name}: option {option!r}", option, _of_file(hints[option]), value)
    for option, parameter in parameters.items():
        if parameter.default is parameter.empty and option not in options:
            raise PeftError(f"{name}: the option {option!r} is missing")


def methods_among(factory: Callable[..., Any], options: Mapping[str, Any]) -> list[str]:
    """The options given that are methods, described by a mapping."""
    hints = get_type_hints(factory)
    given = [option for option, value in options.items() if isinstance(value, Mapping)]
    return [option for option in given if Transform in (hints[option], *get_args(hints[option]))]


def require_shallow(config: Any) -> None:
    """Raise a PeftError where the methods of a configuration nest too deeply."""
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
    """The part of an annotation that a value of JSON can be: no arrays; of a method, its configuration."""
    if hint is Transform:
        return dict[str, Any]
    if get_origin(hint) not in (Union, UnionType):
        return hint
    return reduce(or_, (_of_file(part) for part in get_args(hint) if jax.Array not in get_args(part)))


def _numbers(value: Any) -> list[int | float]:
    """The numbers in a value of one level of lists or mappings."""
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else [value]
    return [one for one in inner if isinstance(one, int | float) and not isinstance(one, bool)]


def _shown(value: Any) -> str:
    text = str(value) if isinstance(value, int) and abs(value) < 2**64 else repr(value)[:60]
    return text if len(text) <= 60 else text[:57] + "..."
