"""Cost of the selective scan in its chunked form."""

INTERVAL = 64  # tokens between the states that the C core keeps for backward


def flops(batch_size: int, seq_len: int, channels: int, state_dim: int) -> int:
    """Matrix FLOPs of one forward: the read-out h_t C_t. The recurrence itself (about 5 operations and one
    exponential for each token, channel and state) is elementwise and left out."""
    return 2 * batch_size * seq_len * channels * state_dim
