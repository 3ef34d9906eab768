"""How many bits a transformer block keeps of each kind of residual."""

from dataclasses import dataclass, fields

from peftjax.errors import PeftError
from peftjax.kernels.packed_residuals import GROUP, check


@dataclass(frozen=True)
class Bits:
    """Bits a value; 4 and 8 share 32 more in each group, 32 keeps the compute dtype as it is.

    Attributes:
        activation: of the derivative of an activation, or of both derivatives of a gated one.
        norm: of the normalised values that a norm's own gradient reads.
        attention: of query, key and value.
        inputs: of what enters a linear layer whose weight is trained, or adapted so that its input is needed.
        group: how many values share a range.

    Raises:
        PeftError: bits that are not 4, 8 or 32, or a group of fewer than 2.
    """

    activation: int = 4
    norm: int = 4
    attention: int = 4
    inputs: int = 8
    group: int = GROUP

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int):
                raise PeftError(f"{field.name} must be a whole number, not {value!r}")
            if field.name != "group":
                check(value, self.group)
