"""Cost of the diagonal scan."""


def flops(batch_size: int, seq_len: int, channels: int) -> int:
    """Matrix FLOPs of one forward: none, the scan is elementwise (about 4 multiply-adds a token and channel)."""
    return 0
