"""The ways in which a model uses a weight: each a value that can be applied to arrays."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from peftjax.kernels.ragged_product import numbers_of_product, ragged_product


@dataclass(frozen=True)
class Dot:
    """A `dot_general` between an activation x and a weight w, whichever side w stands on."""

    x_contract: tuple[int, ...]
    w_contract: tuple[int, ...]
    x_batch: tuple[int, ...] = ()
    w_batch: tuple[int, ...] = ()
    weight_first: bool = False
    precision: Any = None
    preferred: Any = None
    out_sharding: Any = None

    def __call__(self, x: Array, w: Array) -> Array:
        """The product when both are arrays."""
        first, second = (w, x) if self.weight_first else (x, w)
        contract = (self.x_contract, self.w_contract)
        batch = (self.x_batch, self.w_batch)
        if self.weight_first:
            contract, batch = contract[::-1], batch[::-1]
        return lax.dot_general(
            first,
            second,
            (contract, batch),
            precision=self.precision,
            preferred_element_type=self.preferred,
            out_sharding=self.out_sharding,
        )


@dataclass(frozen=True)
class Gather:
    """A `gather` of whole rows of w along one axis, the rows' own axes last in the result."""

    axis: int
    options: tuple[tuple[str, Any], ...] = ()

    def __call__(self, indices: Array, w: Array) -> Array:
        """The rows `[*indices.shape[:-1], *rest of w]`; `indices` has a last axis of size 1."""
        batch = indices.ndim - 1
        rest = tuple(size for position, size in enumerate(w.shape) if position != self.axis)
        numbers = lax.GatherDimensionNumbers(
            offset_dims=tuple(range(batch, batch + len(rest))),
            collapsed_slice_dims=(self.axis,),
            start_index_map=(self.axis,),
        )
        sizes = tuple(1 if position == self.axis else size for position, size in enumerate(w.shape))
        return lax.gather(w, indices, numbers, sizes, **dict(self.options))


@dataclass(frozen=True)
class Conv:
    """A `conv_general_dilated` of an activation with a weight as its kernel."""

    dimension_numbers: lax.ConvDimensionNumbers
    options: tuple[tuple[str, Any], ...]
    feature_group_count: int = 1

    @property
    def preferred(self) -> Any:
        """The dtype asked for the result, None where it follows from the operands."""
        return dict(self.options).get("preferred_element_type")

    def __call__(self, x: Array, w: Array) -> Array:
        """The convolution when the kernel is an array."""
        return lax.conv_general_dilated(
            x,
            w,
            dimension_numbers=self.dimension_numbers,
            feature_group_count=self.feature_group_count,
            **dict(self.options),
        )


_OF_EXPERTS = lax.RaggedDotDimensionNumbers((((1,), (1,)), ((), ())), (0,), (0,))


@dataclass(frozen=True)
class RaggedDot:
    """A `ragged_dot`: rows of x, grouped by expert, times the experts' matrices in w.

    By default x is `[n, in]` and w `[E, in, out]`; `numbers` says what else the axes are.
    """

    group_sizes: Array
    precision: Any = None
    preferred: Any = None
    numbers: lax.RaggedDotDimensionNumbers = _OF_EXPERTS

    @property
    def x_contract(self) -> tuple[int, ...]:
        """The axes of x that are summed over."""
        return tuple(self.numbers.dot_dimension_numbers[0][0])

    @property
    def w_contract(self) -> tuple[int, ...]:
        """The axes of w that are summed over."""
        return tuple(self.numbers.dot_dimension_numbers[0][1])

    @property
    def w_batch(self) -> tuple[int, ...]:
        """The axes of w that x has too."""
        return tuple(self.numbers.dot_dimension_numbers[1][1])

    @property
    def w_group(self) -> int:
        """The axis of the experts."""
        return self.numbers.rhs_group_dimensions[0]

    @property
    def of_rows(self) -> bool:
        """Whether w is a stack of matrices and one row of x says by its place which of them it meets."""
        return len(self.x_contract) == 1 and not self.w_batch and self.group_sizes.ndim == 1

    @property
    def row_axis(self) -> int:
        """Where the rows stand in the result, for one of `of_rows`."""
        (ragged,) = self.numbers.lhs_ragged_dimensions
        return sum(p not in self.x_contract for p in range(ragged))

    def by_row(self, values: Array, x: Array) -> Array:
        """The value of its expert for each row of x, for one of `of_rows`."""
        (ragged,) = self.numbers.lhs_ragged_dimensions
        return jnp.repeat(values, self.group_sizes, axis=0, total_repeat_length=x.shape[ragged])

    def __call__(self, x: Array, w: Array) -> Array:
        """The product when the weight is an array."""
        if self.precision is None and (x.ndim, w.ndim, self.group_sizes.ndim) == (2, 3, 1):
            for transposed in (False, True):
                if self.numbers == numbers_of_product(transposed):
                    options = {"transposed": transposed, "preferred": self.preferred}
                    return ragged_product(x, w, self.group_sizes, **options)
        return lax.ragged_dot_general(
            x,
            w,
            self.group_sizes,
            self.numbers,
            precision=self.precision,
            preferred_element_type=self.preferred,
        )


Contraction = Dot | Gather | Conv | RaggedDot


def met_axes(rule: Contraction) -> tuple[int, ...]:
    """The axes of the weight that an activation meets with its features."""
    if isinstance(rule, Dot | RaggedDot):
        return rule.w_contract
    return (rule.axis,) if isinstance(rule, Gather) else (rule.dimension_numbers.rhs_spec[1],)
