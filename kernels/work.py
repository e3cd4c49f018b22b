"""Work that the mathematics of layers takes, however it is run: what counts as what stands in `zoo.contract.Cost`.

Pairs are those of one row: queries at the places `context` .. `context` + `queries` - 1, each with the keys it sees.
"""

from __future__ import annotations

# operations outside matrix products, of one number
SIGMOID = 1
SILU = GELU = 2  # the gate of a number, and their product
ROPE = 3  # two products and their sum
UNIT = 3  # made of length one: squares, their sum, the product with its root
RMS = 4  # and the product with a weight
LAYER = 7  # and the mean, what is left of it, a bias
SOFTMAX = 5  # greatest score, difference, exponential, sum, quotient
SOFTCAP = 3  # quotient, tanh, product

# products of a matrix state with a vector and rank-one updates of it, for each token
LINEAR = 2  # k v^T is added, q reads
DELTA = 3  # what is stored under k is read, too
DPLR = 4  # and what is taken away is an update of its own


def _capped(n: int, cap: int) -> int:
    """sum of min(i, cap) for i = 1 .. n."""
    return n * (n + 1) // 2 if n <= cap else cap * (cap + 1) // 2 + (n - cap) * cap


def _floors(n: int, step: int) -> int:
    """sum of i // step for i = 0 .. n - 1."""
    whole, rest = divmod(max(n, 0), step)
    return step * whole * (whole - 1) // 2 + rest * whole


def pairs(queries: int, context: int = 0, most: int | None = None) -> int:
    """Each query sees itself and the keys before it, of these `most` where given: a window, or so many chosen ones."""
    cap = context + queries if most is None else most
    return _capped(context + queries, cap) - _capped(context, cap)


def window_pairs(queries: int, context: int, window: int | None, sinks: int = 0) -> int:
    """Each query sees `window` keys up to itself, and the first `sinks`."""
    return pairs(queries, context, None if window is None else window + sinks)


def earlier_blocks(queries: int, context: int, size: int, most: int | None = None) -> int:
    """Pairs of queries and whole blocks before their own, `most` a query where given."""
    if most == 0:
        return 0

    def up_to(n: int) -> int:
        whole, rest = divmod(n, size)
        cap = whole if most is None else most
        return size * _capped(whole - 1, cap) + rest * min(cap, whole) if whole else 0

    return up_to(context + queries) - up_to(context)


def block_pairs(queries: int, context: int, size: int, most: int | None = None) -> int:
    """Each query sees its own block up to itself, and `most` - 1 whole blocks before it."""

    def own(n: int) -> int:
        whole, rest = divmod(n, size)
        return whole * size * (size + 1) // 2 + rest * (rest + 1) // 2

    past = earlier_blocks(queries, context, size, None if most is None else most - 1)
    return own(context + queries) - own(context) + size * past


def complete_windows(tokens: int, stride: int, size: int) -> int:
    """Windows of `size` tokens, one every `stride`, that lie in the first `tokens`."""
    return (tokens - size) // stride + 1 if tokens >= size else 0


def window_scores(queries: int, context: int, stride: int, size: int) -> int:
    """Pairs of queries and complete windows; a query may be the last token of a window."""

    def up_to(n: int) -> int:
        return _floors(n + 1 - size + stride, stride) if n >= size else 0

    return up_to(context + queries) - up_to(context)


def attention_work(heads: int, pairs: int, key_dim: int, value_dim: int) -> int:
    """Matrix FLOPs of scores and values."""
    return 2 * heads * pairs * (key_dim + value_dim)


def recurrence(products: int, tokens: int, heads: int, key_dim: int, value_dim: int) -> int:
    """Matrix FLOPs of matrix states [heads, key_dim, value_dim] that take so many `products` a token."""
    return 2 * products * tokens * heads * key_dim * value_dim


def is_kept(rows: int, inner: int, columns: int) -> bool:
    """Whether selective checkpointing keeps a product of batches of matrices: not of vectors, and not where it has more
    numbers than both."""
    return min(rows, columns) > 1 and rows * columns <= inner * (rows + columns)


def unread_keys(queries: int, context: int, chosen: int) -> int:
    """Keys of the context that nobody reads where every query chooses so many, all of them different."""
    return max(0, context - queries * chosen)
