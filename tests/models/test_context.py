"""What blocks share, as a pytree."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from peftjax.backbone.context import Context


def test_what_is_not_there_is_no_leaf():
    mask = jnp.ones((1, 2), bool)
    assert jax.tree.leaves(Context()) == []
    assert [leaf.shape for leaf in jax.tree.leaves(Context(mask=mask))] == [(1, 2)]
    paths = jax.tree_util.tree_flatten_with_path(Context(mask=mask, rotation=(mask, mask)))[0]
    assert [jax.tree_util.keystr(path) for path, _ in paths] == [".mask", ".rotation[0]", ".rotation[1]"]


def test_it_goes_through_a_scan_and_a_derivative():
    def total(context):
        def body(x, layer):
            shared = dataclasses.replace(context, layer=layer)
            assert shared.segments is None
            return x + shared.bias.sum() * shared.layer, None

        return jax.lax.scan(jax.checkpoint(body), 0.0, jnp.arange(3.0))[0]

    gradient = jax.jit(jax.grad(total))(Context(bias=jnp.ones((1, 1, 2, 2))))
    assert isinstance(gradient, Context)
    assert gradient.mask is None
    assert gradient.bias.tolist() == [[[[3.0, 3.0], [3.0, 3.0]]]]


def test_a_misspelled_part_is_an_error():
    with pytest.raises(TypeError, match="maks"):
        dataclasses.replace(Context(), maks=None)
