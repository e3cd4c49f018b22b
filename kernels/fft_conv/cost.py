"""Cost of the long convolution."""


def flops(batch_size: int, seq_len: int, channels: int, taps: int) -> int:
    """Matrix FLOPs of one forward: none. Transforms take about 15 log2(seq_len + taps) operations a token and
    channel, which like all elementwise work are left out; so is a decode step's dot product of 2 taps operations."""
    return 0
