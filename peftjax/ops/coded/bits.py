"""How many bits a transformer block keeps of each kind of residual."""

from dataclasses import dataclass, fields

from jax import Array, lax

from peftjax.core.errors import PeftError
from peftjax.quantize import Codes
from peftjax.quantize.affine import GROUP, check, coarse, encode


@dataclass(frozen=True)
class Bits:
    """Bits a value; 4 and 8 share 32 more in each group, 32 keeps the compute dtype as it is.

    Attributes:
        activation: 4: codes of the derivative, without a range of a group; 8: codes of what enters it.
        gated: of both arrays that enter a gated activation.
        norm: of the normalized values that a norm's own gradient reads.
        attention: of query, key and value.
        inputs: of what enters a linear layer that needs it: one that is trained, or adapted.
        group: how many values share a range.

    Raises:
        PeftError: bits that are not 4, 8 or 32, or a group of fewer than 2.
    """

    activation: int = 4
    gated: int = 8
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

    def codes(self, x: Array, own: int) -> tuple[Codes | Array, Codes | Array]:
        """Codes of `x` in `own` bits, and in `inputs` bits; the first are a part of the second, or equal."""
        x = lax.stop_gradient(x)
        if 32 in (own, self.inputs):
            return encode(x, own, group=self.group), encode(x, self.inputs, group=self.group)
        both = encode(x, max(own, self.inputs), group=self.group)
        return (coarse(both) if own == 4 else both), (coarse(both) if self.inputs == 4 else both)
