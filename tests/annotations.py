"""What checks annotations under `pytest --check-shapes`: jaxtyping's by dtype and shape, and all others."""

import warnings
from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype

# An int is a float to type checkers. Of what beartype cannot check, such as `typing.Self`, it warns.
CONFIG = BeartypeConf(is_pep484_tower=True, warning_cls_on_decorator_exception=UserWarning)


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its annotations checked, but for `__init__`: JAX fills pytrees with what it likes."""
    if function.__name__ == "__init__":
        return function
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return beartype(function, conf=CONFIG)
