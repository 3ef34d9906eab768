"""Norms that keep codes of the normalized values: exact forward, the closed gradient, bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import KEY, assert_close, normal

from peftjax.backbone.block_config import BlockConfig
from peftjax.backbone.coded_layers import norm_of
from peftjax.ops.coded.norm import normalize, statistics
from peftjax.quantize.affine import encode

B, S, D = 3, 5, 192
X = 3 + normal(KEY, (B, S, D))
SCALE, BIAS = 1 + 0.3 * normal(KEY, (2, D))
G = normal(jax.random.key(2), X.shape)
KINDS = ("layer", "rms", "rms_plus_one")


def norm(kind, dtype=jnp.float32):
    config = BlockConfig(width=D, num_heads=1, inner_size=1, activation="gelu", norm_epsilon=0.1, norm=kind)
    return norm_of(config, jnp.dtype(dtype))


def coded(kind, bits, fine=None, dtype=jnp.float32):
    def run(x, scale, bias):
        unit, r = statistics(norm(kind, dtype), x)
        more = None if fine is None else encode(unit, fine)
        return normalize(norm(kind, dtype), x, scale, bias, encode(unit, bits), r, more)

    return run


def operands(kind, dtype=jnp.float32):
    return X.astype(dtype), SCALE, BIAS if kind == "layer" else None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_forward_is_bit_for_bit(kind, dtype):
    y = jax.jit(lambda *p: jax.vjp(coded(kind, 4, 8, dtype), *p)[0])(*operands(kind, dtype))
    assert y.dtype == dtype
    np.testing.assert_array_equal(y, jax.jit(norm(kind, dtype).plain)(*operands(kind, dtype)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_without_rounding_the_gradient_is_that_of_autodiff(kind):
    exact = jax.vjp(norm(kind).plain, *operands(kind))[1](G)
    assert_close(jax.vjp(coded(kind, 32), *operands(kind))[1](G), exact, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_four_bits_are_enough_for_the_input_and_eight_for_the_scale(kind):
    def error(of, bits, fine=None):
        exact = jax.vjp(norm(kind).plain, *operands(kind))[1](G)[of]
        found = jax.vjp(coded(kind, bits, fine), *operands(kind))[1](G)[of]
        return float(jnp.linalg.norm(found - exact) / jnp.linalg.norm(exact))

    assert 1e-4 < error(0, 4) < 0.015
    assert 0.02 < error(1, 4) < 0.12
    assert error(1, 4, 8) < 0.1 * error(1, 4)


@pytest.mark.parametrize(("kind", "trains_scale"), [("layer", False), ("rms", False), ("rms", True)])
def test_what_is_kept(kind, trains_scale):
    """Codes, two bfloat16 a group and r; the fine codes with a trained scale only."""

    def residuals(x, scale, bias):
        run = lambda x, scale: coded(kind, 4, 8)(x, scale, bias)
        inputs = (x, scale) if trains_scale else (x,)
        pull = jax.vjp(lambda x, s=scale: run(x, s), *inputs)[1]
        return [leaf for leaf in jax.tree.leaves(pull) if leaf.ndim == 3]

    kept = jax.eval_shape(residuals, *operands(kind))
    codes, numbers = ((B, S, D // 2), jnp.dtype("uint8")), ((B, S, 3), jnp.dtype("bfloat16"))
    wanted = [codes, numbers, numbers, ((B, S, 1), jnp.dtype("float32"))]
    if trains_scale:
        wanted += [codes, codes, numbers, numbers]
    assert sorted(map(str, ((leaf.shape, leaf.dtype) for leaf in kept))) == sorted(map(str, wanted))
