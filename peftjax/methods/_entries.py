"""Which entries of a matrix are trained: (row, column) pairs `[*stack, K]` int32, in row-major order.

The searches are jitted by size, so that a model's many weights of few sizes compile few programs.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from peftjax.core.errors import PeftError
from peftjax.weights.layout import Layout
from peftjax.weights.sharding import whole

Entries = tuple[Array, Array]


def entry_count(caller: str, path: str, layout: Layout, rank: int, density: float | None) -> int:
    """K: the density's share of a matrix, or `rank · (in + out)`, as many numbers as LoRA has.

    Raises:
        PeftError: the matrix has fewer entries.
    """
    n, m = layout.matrix
    count = rank * (n + m) if density is None else max(1, round(density * n * m))
    if count > n * m:
        raise PeftError(
            f"{caller}: {count} entries do not fit {path!r}, a matrix of {n} x {m}; lower rank, give a "
            "density, or exclude it"
        )
    return count


def random_entries(key: Array, layout: Layout, count: int) -> Entries:
    """`count` entries of each matrix, uniformly without replacement."""
    keys = jax.random.split(key, layout.stack) if layout.stack else key[None]
    return _unstacked(_random(keys.reshape(-1), *layout.matrix, count), layout)


def largest_entries(scores: Array, layout: Layout, count: int) -> Entries:
    """The entries with the largest scores `[*stack, in, out]` of each matrix; the earlier of equals."""
    return _unstacked(_largest(whole(scores).reshape(-1, *layout.matrix), count), layout)


def structured_entries(caller: str, path: str, layout: Layout, count: int) -> Entries:
    """Every f-th row and column and the diagonal, f the smallest number with at most `count` entries.

    Raises:
        PeftError: `count` is too small for a row, a column and the diagonal.
    """
    n, m = layout.matrix

    def size(f: int) -> int:
        rows, columns, diagonal = -(-n // f), -(-m // f), min(n, m)
        return rows * m + columns * n - rows * columns + diagonal - -(-diagonal // f)

    f = next((f for f in range(1, max(n, m) + 1) if size(f) <= count), None)
    if f is None:
        raise PeftError(
            f"{caller}: a structured mask of {path!r} needs {size(max(n, m))} entries, and has {count}; "
            "raise rank or density"
        )
    row, column = np.ogrid[:n, :m]
    found = np.nonzero((row % f == 0) | (column % f == 0) | (row == column))
    rows, columns = (
        jnp.asarray(np.broadcast_to(part, (*layout.stack, part.size)), jnp.int32) for part in found
    )
    return rows, columns


@partial(jax.jit, static_argnums=(1, 2, 3))
def _random(keys: Array, n: int, m: int, count: int) -> Entries:
    draw = _permuted if count > n * m // 4 else _drawn
    return lax.map(lambda key: draw(key, n, m, count), keys)


@partial(jax.jit, static_argnums=1)
def _largest(scores: Array, count: int) -> Entries:
    def pick(scores: Array) -> Entries:
        return jnp.divmod(jnp.sort(lax.top_k(scores.reshape(-1), count)[1]), scores.shape[-1])

    return lax.map(pick, scores)


def _unstacked(entries: Entries, layout: Layout) -> Entries:
    rows, columns = (part.reshape(*layout.stack, -1).astype(jnp.int32) for part in entries)
    return rows, columns


def _permuted(key: Array, n: int, m: int, count: int) -> Entries:
    return jnp.divmod(jnp.sort(jax.random.permutation(key, n * m)[:count]), m)


def _drawn(key: Array, n: int, m: int, count: int) -> Entries:
    """A sample whose cost is that of `count` numbers, however large the matrix.

    More pairs than needed are drawn; of the distinct ones `count` are taken at random, which leaves no
    set more likely than another. Should there be too few, all are redrawn.
    """
    draws = count + count // 4 + 16

    def draw(state: tuple) -> tuple:
        key, *keys = jax.random.split(state[0], 4)
        rows = jax.random.randint(keys[0], (draws,), 0, n)
        columns = jax.random.randint(keys[1], (draws,), 0, m)
        rows, columns = lax.sort((rows, columns), num_keys=2)
        new = jnp.ones(draws, bool).at[1:].set((jnp.diff(rows) != 0) | (jnp.diff(columns) != 0))
        order = jnp.argsort(jnp.where(new, jax.random.uniform(keys[2], (draws,)), 2.0))[:count]
        return key, rows[order], columns[order], jnp.sum(new) >= count

    nothing = jnp.zeros(count, jnp.int32)
    state = lax.while_loop(lambda state: ~state[3], draw, (key, nothing, nothing, jnp.array(False)))
    return lax.sort((state[1], state[2]), num_keys=2)
