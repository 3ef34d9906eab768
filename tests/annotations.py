"""What checks annotations under `pytest --check-shapes`: jaxtyping's by dtype and shape, and all others."""

import warnings

from beartype import BeartypeConf, beartype


class Unchecked(UserWarning):
    """A function with an annotation that beartype cannot check, such as `typing.Self` or a protocol."""


warnings.simplefilter("ignore", Unchecked)
# An int is a float to type checkers.
checked = beartype(conf=BeartypeConf(is_pep484_tower=True, warning_cls_on_decorator_exception=Unchecked))
