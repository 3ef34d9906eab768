"""A weight with a map beside it that looks at all rows of an activation, and so is no matrix."""

from typing import ClassVar, NoReturn

from peftjax.core.errors import PeftError
from peftjax.weights.canonical import side_of
from peftjax.weights.contraction import Contraction, Dot
from peftjax.weights.fields import structured
from peftjax.weights.mapped import Mapped


@structured
class MappedRows(Mapped):
    """`y = x·base + map(x)`, the map of all rows of x at once; there is no array that does the same.

    Only products with the inputs of whole matrices are such. Backward keeps x, and recomputes the map.
    """

    has_dense: ClassVar[bool] = False

    def dense(self) -> NoReturn:
        """Nothing.

        Raises:
            PeftError: always.
        """
        raise PeftError(
            f"{self.layout.name}: what is added depends on all tokens of a call, so that no weight does the "
            "same; run the adapted model, method.model(model), instead"
        )

    def supports(self, rule: Contraction) -> bool:
        """Products with the inputs, matrix by matrix."""
        if not isinstance(rule, Dot) or side_of(self.layout, rule.w_contract) != "i":
            return False
        return set(rule.w_batch) == set(self.layout.positions("s")) and not self.layout.positions("1")
