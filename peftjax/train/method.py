"""From the options of a run to its method."""

import inspect
import math
import re
from typing import Any

from peftjax.core.errors import PeftError
from peftjax.train.options import MethodOptions
from peftjax.train.options_file import parse_yaml
from peftjax.transform.chain import chain
from peftjax.transform.registry import METHODS, build, find_method
from peftjax.transform.transform import Transform

_REGEX_CHARACTERS = re.compile(r"[.*+?\[\](){}|\\^$]")


def make_method(options: MethodOptions, steps: int | None = None) -> Transform:
    """The method with the given options, the others at its defaults.

    Args:
        options: the method and what is given of its options.
        steps: optimizer steps of the run, for the options that follow from them.

    Raises:
        PeftError: the method or an option is unknown, or a value does not fit.
    """
    given: dict[str, Any] = {
        name: value for name in ("rank", "alpha", "dropout") if (value := getattr(options, name)) is not None
    }
    if options.targets:
        one_string = len(options.targets) == 1 and (
            options.targets[0] == "all-linear" or _REGEX_CHARACTERS.search(options.targets[0])
        )
        given["targets"] = options.targets[0] if one_string else list(options.targets)
    for pair in options.method_options:
        name, equals, value = pair.partition("=")
        if not equals:
            raise PeftError(f"method option {pair!r} is not of the form name=value")
        try:
            given[name] = parse_yaml(value)
        except ValueError as error:
            raise PeftError(f"method option {name!r} cannot be read: {error}") from error
    for name, value in given.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise PeftError(f"the method's option {name!r} is {value}, but has to be a finite number")
    names = options.method.split("+")
    known = {name: inspect.signature(find_method(name).factory).parameters for name in names}
    for option in given:
        if len(names) > 1 and not any(option in own for own in known.values()):
            raise PeftError(f"none of {', '.join(names)} has an option {option!r}")
    methods = []
    for name in names:
        taken = {option: value for option, value in given.items() if len(names) == 1 or option in known[name]}
        of_steps = METHODS[name].of_steps
        if of_steps is not None and steps is not None:
            taken = {**of_steps(steps), **taken}
        methods.append(build({"name": name, **taken}))
    return methods[0] if len(methods) == 1 else chain(*methods)


def needs_steps(options: MethodOptions) -> bool:
    """Whether `make_method` has to know the steps of the run."""
    infos = [METHODS[name] for name in options.method.split("+") if name in METHODS]
    return any(info.of_steps is not None for info in infos)
