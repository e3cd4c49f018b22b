"""Cost of the chunked form."""


def flops(batch_size: int, num_queries: int, num_blocks: int, num_heads: int, head_dim: int) -> int:
    """Matrix FLOPs of scoring every block for every query."""
    return 2 * batch_size * num_heads * num_queries * num_blocks * head_dim
