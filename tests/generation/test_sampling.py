"""Draws follow the distribution computed directly; the cuts keep what they say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peftjax.core.errors import PeftError
from peftjax.generation.sampling import choice, greedy, keep_top_k, keep_top_p, sample

LOGITS = np.array([[2.0, 0.5, -1.0, 1.2, 0.0, -3.0], [0.0, 0.1, 0.2, 3.0, 2.9, 0.3]], np.float32)
DRAWS = 20_000


def direct(row, temperature, top_k, top_p):
    """The probabilities by sorting and adding up, in float64."""
    scaled = row.astype(np.float64) / temperature
    order = np.argsort(-scaled, kind="stable")
    kept = order[: top_k or len(row)]
    probabilities = np.zeros(len(row))
    probabilities[kept] = np.exp(scaled[kept]) / np.exp(scaled[kept]).sum()
    total, nucleus = 0.0, []
    for token in kept:
        nucleus.append(token)
        total += probabilities[token]
        if top_p is not None and total >= top_p:
            break
    cut = np.zeros(len(row))
    cut[nucleus] = probabilities[nucleus]
    return cut / cut.sum()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, None, None), (0.5, None, None), (2.0, 3, None), (1.0, None, 0.8), (1.5, 4, 0.7)],
)
def test_draws_follow_the_distribution(temperature, top_k, top_p):
    keys = jax.random.split(jax.random.key(0), DRAWS)
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    tokens = jax.jit(jax.vmap(lambda key: sample(LOGITS, key, **options)))(keys)
    for row, drawn in zip(LOGITS, np.asarray(tokens).T):
        wanted = direct(row, temperature, top_k, top_p)
        found = np.bincount(drawn, minlength=len(row)) / DRAWS
        assert (found[wanted == 0] == 0).all()
        # Five standard deviations of each frequency.
        np.testing.assert_array_less(np.abs(found - wanted), 5 * np.sqrt(wanted / DRAWS) + 1e-9)


def kept(logits):
    return [np.flatnonzero(np.isfinite(row)).tolist() for row in np.asarray(logits)]


def test_top_k_keeps_equals_of_the_smallest():
    assert kept(keep_top_k(jnp.asarray(LOGITS), 2)) == [[0, 3], [3, 4]]
    assert kept(keep_top_k(jnp.array([[1.0, 0.0, 1.0, 1.0]]), 2)) == [[0, 2, 3]]
    assert kept(keep_top_k(jnp.asarray(LOGITS), 6)) == [list(range(6))] * 2
    with pytest.raises(PeftError, match="top_k must be 1 to the 6 tokens"):
        keep_top_k(jnp.asarray(LOGITS), 7)


def test_top_p_keeps_one_at_least_and_the_first_of_equals():
    assert kept(keep_top_p(jnp.asarray(LOGITS), 1e-9)) == [[0], [3]]
    assert kept(keep_top_p(jnp.asarray(LOGITS), 0.0)) == [[0], [3]]
    equal = jnp.zeros((1, 4))
    assert kept(keep_top_p(equal, 0.25)) == [[0]]
    assert kept(keep_top_p(equal, 0.26)) == [[0, 1]]
    assert kept(keep_top_p(equal, 1.0)) == [[0, 1, 2, 3]]


def test_bfloat16_logits_are_drawn_in_float32():
    """Of 3,000 equal tokens, bfloat16 sums of probabilities would stop far from half."""
    equal = jnp.zeros((1, 3000), jnp.bfloat16)
    keys = jax.random.split(jax.random.key(1), 400)
    drawn = jax.vmap(lambda key: sample(equal, key, temperature=jnp.asarray(1.0), top_p=0.5))(keys)
    assert 1400 < int(drawn.max()) <= 1500


def test_greedy_takes_the_first_of_equals_and_reads_no_key():
    logits = jnp.array([[0.0, 2.0, 2.0], [1.0, 0.0, -1.0]])
    assert greedy(logits).tolist() == choice()(logits, None, 0).tolist() == [1, 0]


def test_every_count_draws_with_its_own_key():
    choose, logits = choice(temperature=1.0), jnp.zeros((4, 100))
    first, again, second = (choose(logits, jax.random.key(0), n) for n in (0, 0, 1))
    assert first.tolist() == again.tolist()
    assert first.tolist() != second.tolist()
    assert len(set(first.tolist())) > 1
