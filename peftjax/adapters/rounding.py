"""An adapter that was trained as codes, as an ordinary adapter of floats."""

from peftjax.core.errors import PeftError
from peftjax.methods.quantization.quantized_adapter import NAME, of_adapter, seen
from peftjax.transform.frozen import Frozen, Trainable
from peftjax.transform.registry import build
from peftjax.transform.transform import Transform


def rounded(method: Transform, frozen: Frozen, trainable: Trainable) -> tuple[Transform, Frozen, Trainable]:
    """The adapter within a `quantized_adapter`, with the matrices that the model has seen.

    Its `(method, frozen, trainable)` is exported, added, mixed and converted as any other.

    Args:
        method: a `pj.quantized_adapter`; not a chain of it and others.
        frozen: of it.
        trainable: its numbers, or the codes of a file.

    Raises:
        PeftError: it is another method.
    """
    if method.name != NAME:
        raise PeftError(f"rounded: {method.name!r} is no {NAME}, and has nothing to round; use it as it is")
    inner = build(method.config["method"])
    return inner, of_adapter(frozen), seen(frozen, trainable, method.config["bits"])
