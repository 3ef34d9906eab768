"""Rows in the order of their groups times the matrices of the groups: the products of experts."""

from peftjax.kernels.ragged_product.operation import (
    PRODUCT,
    numbers_of_product,
    ragged_outer,
    ragged_product,
    ragged_product_of,
)

__all__ = ["PRODUCT", "numbers_of_product", "ragged_outer", "ragged_product", "ragged_product_of"]
