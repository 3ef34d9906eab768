"""cuDNN's attention, of `jax.nn.dot_product_attention`: causal or not, a window, padding behind tokens."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from peftjax.core.errors import PeftError
from peftjax.kernels.attention.operands import Operands, Scores
from peftjax.kernels.attention.windows import by_window

WIDEST = 128
"""Of a head; Hopper takes 256, but JAX asks for that the GPU that is there, not the one compiled for."""


def refused(operands: Operands, scores: Scores) -> str | None:
    """Why the kernel cannot compute it; None where it can."""
    query, key, value = operands[:3]
    width = query.shape[-1]
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN's attention has no {query.dtype}"
    if width > WIDEST or width % 8 or value.shape[-1] != width:
        return f"cuDNN's attention has no heads of {width} numbers"
    if scores.softcap is not None:
        return "cuDNN's attention has no soft-capping"
    if operands.sinks is not None:
        return "cuDNN's attention has no sinks"
    if operands.segments is not None:
        return "cuDNN's attention, as JAX has it, has no segments, which packed rows need"
    if not scores.causal and scores.windows != (None,):
        return "cuDNN's attention has no window without causal order"
    if scores.causal and query.shape[1] != key.shape[1]:
        return "causal queries are not as many as the keys"
    return None


def padded_behind(mask: Array) -> Array:
    """Whether the tokens of every row come first, which alone the kernel knows."""
    return jnp.all(mask[..., 1:] <= mask[..., :-1])


def in_device_code(f: Callable[..., Any]) -> Callable[..., Any]:
    """`f` in the code of one device, or of each where it is that already.

    JAX lets XLA divide cuDNN's attention over devices, and for that asks which they are while it lowers it.
    """
    if jax.sharding.get_abstract_mesh().manual_axes:
        return f
    alone = jax.sharding.AbstractMesh((1,), ("alone",))
    whole = jax.sharding.PartitionSpec()
    return jax.shard_map(f, mesh=alone, in_specs=whole, out_specs=whole, check_vma=False)


def attend(operands: Operands, scores: Scores) -> Array:
    """`softmax(c(s Q K^T)) V`, [B, T, N, V], of rows padded behind. A row without a token sees its first key.

    Raises:
        PeftError: cuDNN, which is asked for its version while the program is lowered, is not installed.
    """
    lengths = None
    if operands.mask is not None:
        lengths = jnp.maximum(jnp.sum(operands.mask, axis=1, dtype=jnp.int32), 1)

    def run(window: int | None, query: Array, key: Array, value: Array, lengths: Array | None) -> Any:
        try:
            return jax.nn.dot_product_attention(
                query,
                key,
                value,
                scale=scores.scale,
                is_causal=scores.causal,
                local_window_size=None if window is None else (window - 1, 0),
                key_value_seq_lengths=lengths,
                implementation="cudnn",
            )
        except RuntimeError as error:
            raise PeftError(
                f"attention 'flash' for an NVIDIA GPU is cuDNN's ({error}): pip install nvidia-cudnn-cu13, "
                "or choose 'rows'"
            ) from error

    return by_window(scores.windows, operands.window, operands.key.shape[1], run, (*operands[:3], lengths))
