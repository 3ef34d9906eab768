"""How much of a long sequence's activations to move to the host: the rule of MEMO (arXiv 2407.12117)."""


def offload_fraction(
    kept_bytes: float,
    other_bytes: float,
    *,
    bandwidth: float,
    layer_seconds: float,
    host_bytes: float,
    layers: int,
) -> float:
    """The share of the tokens to offload whole, the other tokens being recomputed.

        alpha = max a in [0, 1]   with   (kept + a other) <= bandwidth layer_seconds
                                  and    (layers - 2) (kept + a other) <= host_bytes

    What a layer moves must not take longer than the next layer's forward pass, and all layers but the last
    two, whose backward pass comes at once, must fit into the host. It is 0 where `kept_bytes` alone do not:
    then the transfer of "offload_attention" is not hidden, or does not fit. For `Backbone.remat`,
    `f"offload_attention:{alpha}"`.

    Args:
        kept_bytes: of a layer's input and attention result, always moved: 4 B S D in 16 bits.
        other_bytes: of what else its backward pass reads, for all tokens: `plan(...).kept` of a layer without
            these two.
        bandwidth: bytes a second from the device to the host.
        layer_seconds: of a layer's forward pass.
        host_bytes: of the host's memory.
        layers: of the model.
    """
    moved = bandwidth * layer_seconds
    if layers > 2:
        moved = min(moved, host_bytes / (layers - 2))
    if other_bytes <= 0:
        return 1.0 if kept_bytes <= moved else 0.0
    return min(max((moved - kept_bytes) / other_bytes, 0.0), 1.0)
