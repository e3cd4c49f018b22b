"""Calls of each op as they are timed: functions (draw, T, step) of one call over T tokens, or (`step`) of one token
after T, with sizes as they are in models of a few hundred million parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.kernels import attention as attention_op
from zoo.kernels import block_linear as block_linear_op
from zoo.kernels import block_scores as block_scores_op
from zoo.kernels import delta_rule as delta_rule_op
from zoo.kernels import diagonal_scan as diagonal_scan_op
from zoo.kernels import dplr as dplr_op
from zoo.kernels import grouped_mm as grouped_mm_op
from zoo.kernels import linear as linear_op
from zoo.kernels import linear_attention as linear_attention_op
from zoo.kernels import merge_lse as merge_lse_op
from zoo.kernels import pool_blocks as pool_blocks_op
from zoo.kernels import prefix_topk as prefix_topk_op
from zoo.kernels import product_key_lookup as product_key_op
from zoo.kernels import rope as rope_op
from zoo.kernels import select as select_op
from zoo.kernels import select_blocks as select_blocks_op
from zoo.kernels import selective_scan as selective_scan_op
from zoo.kernels import short_conv as short_conv_op
from zoo.kernels import sparse_attention as sparse_attention_op
from zoo.kernels.block_linear.cost import blast_flops, monarch_flops
from zoo.kernels.grouped_mm.cost import flops as grouped_mm_flops
from zoo.kernels.product_key_lookup.cost import flops as product_key_flops


class Problem(NamedTuple):
    """One call: `call(backend, *inputs)` returns what must agree between the ways to compute it."""

    call: Callable[..., Tensor | tuple[Tensor, ...]]
    inputs: Sequence[Tensor]
    flops: int


class Draw:
    """Random tensors of one device and dtype. A GPU gets more rows and wider heads."""

    def __init__(self, device: str, dtype: torch.dtype, seed: int = 0):
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator().manual_seed(seed)
        self.batch, self.head_dim = (8, 128) if device == "cuda" else (1, 64)
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32

    def __call__(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        return (scale * torch.randn(shape, generator=self.generator)).to(self.device, dtype or self.dtype)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Gates, in the precision in which blocks give them."""
        return (low + (high - low) * torch.rand(shape, generator=self.generator)).to(self.device, self.wide)

    def decay(self, *shape: int, most: float = 0.1) -> Tensor:
        """Logarithms of decays, down to -most."""
        return -self.uniform(*shape, high=most)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator).to(self.device)

    def positions(self, length: int, start: int = 0) -> Tensor:
        return torch.arange(start, start + length, device=self.device).expand(self.batch, length)


def linear_attention(decay: str, heads: int, groups: int, key_dim: int | None = None) -> Callable[..., Problem]:
    """`decay`: constant, head or channel; `groups` heads of q and k serve `heads` heads of v."""

    def make(draw: Draw, T: int, step: bool) -> Problem:
        n, B, Dv = 1 if step else T, draw.batch, draw.head_dim
        Dk = key_dim or Dv
        q, k = draw(B, n, groups, Dk, scale=Dk**-0.5), draw(B, n, groups, Dk)
        shape = {"constant": (heads,), "head": (B, n, heads), "channel": (B, n, heads, Dk)}[decay]
        inputs = [q, k, draw(B, n, heads, Dv), draw.decay(*shape)]
        if step:
            inputs.append(draw(B, heads, Dk, Dv, dtype=draw.wide))

        def call(backend: str, q, k, v, g, state=None):
            o, last = linear_attention_op.linear_attention(q, k, v, g, initial_state=state, backend=backend)
            return (o, last) if step else o

        kind: Any = "channel" if decay == "channel" else "head"
        flops = linear_attention_op.flops(B, n, heads, Dk, Dv, num_groups=groups, decay=kind)
        return Problem(call, inputs, flops)

    return make


def delta_rule(channel: bool) -> Callable[..., Problem]:
    """With a decay per channel (Kimi) or per head (Qwen3-Next), keys of unit length."""

    def make(draw: Draw, T: int, step: bool) -> Problem:
        n, B, H, D = 1 if step else T, draw.batch, 8, draw.head_dim
        q, k = (F.normalize(draw(B, n, H, D).float(), dim=-1).to(draw.dtype) for _ in range(2))
        g = draw.decay(B, n, H, *([D] if channel else []))
        inputs = [q, k, draw(B, n, H, D), draw.uniform(B, n, H), g]
        if step:
            inputs.append(draw(B, H, D, D, dtype=draw.wide))

        def call(backend: str, q, k, v, beta, g, state=None):
            o, last = delta_rule_op.delta_rule(
                q, k, v, beta, g, scale=D**-0.5, initial_state=state, backend=backend
            )  # fmt: skip
            return (o, last) if step else o

        return Problem(call, inputs, delta_rule_op.flops(B, n, H, D, D, channel_decay=channel))

    return make


def dplr(draw: Draw, T: int, step: bool) -> Problem:
    """As RWKV-7 runs it: a and b replace part of what is stored under a key of unit length."""
    n, B, H, D = 1 if step else T, draw.batch, 8, draw.head_dim
    q, k, v = (draw(B, n, H, D) for _ in range(3))
    a = F.normalize(draw(B, n, H, D).float(), dim=-1)
    b = -a * draw.uniform(B, n, H, D)
    inputs = [q, k, v, a.to(draw.dtype), b.to(draw.dtype), draw.decay(B, n, H, D)]
    if step:
        inputs.append(draw(B, H, D, D, dtype=draw.wide))

    def call(backend: str, q, k, v, a, b, g, state=None):
        o, last = dplr_op.dplr(q, k, v, a, b, g, initial_state=state, backend=backend)
        return (o, last) if step else o

    return Problem(call, inputs, dplr_op.flops(B, n, H, D, D))


def linear(draw: Draw, T: int, step: bool) -> Problem:
    """The widest layer of a feed-forward network of width 512."""
    K, N = 8 * draw.head_dim, 32 * draw.head_dim
    rows = draw.batch * (1 if step else T)

    def call(backend: str, x, weight):
        return linear_op.linear(x, weight, backend=backend)

    return Problem(call, [draw(rows, K), draw(N, K, scale=K**-0.5)], 2 * rows * K * N)


def diagonal_scan(draw: Draw, T: int, step: bool) -> Problem:
    """As the RG-LRU runs it."""
    n, B, width = 1 if step else T, draw.batch, 8 * draw.head_dim
    inputs = [draw.decay(B, n, width, most=0.5), draw(B, n, width)]
    if step:
        inputs.append(draw(B, width, dtype=draw.wide))

    def call(backend: str, log_decay, x, state=None):
        h, last = diagonal_scan_op.diagonal_scan(log_decay, x, initial_state=state, backend=backend)
        return (h, last) if step else h

    return Problem(call, inputs, 0)


def selective_scan(draw: Draw, T: int, step: bool) -> Problem:
    """As Mamba runs it, without its skip connection."""
    n, B, E, N = 1 if step else T, draw.batch, 16 * draw.head_dim, 16
    delta, A = draw.uniform(B, n, E, low=1e-3, high=0.1), -draw.uniform(E, N, low=0.5, high=16.0)
    inputs = [draw(B, n, E), delta, A, draw(B, n, N), draw(B, n, N)]
    if step:
        inputs.append(draw(B, E, N, dtype=draw.wide))

    def call(backend: str, u, delta, A, B, C, state=None):
        y, last = selective_scan_op.selective_scan(u, delta, A, B, C, initial_state=state, backend=backend)
        return (y, last) if step else y

    return Problem(call, inputs, selective_scan_op.flops(B, n, E, N))


def short_conv(draw: Draw, T: int, step: bool) -> Problem:
    """Four taps and silu."""
    n, B, D, W = 1 if step else T, draw.batch, 16 * draw.head_dim, 4
    inputs = [draw(B, n, D), draw(D, W, scale=0.5), draw(D, scale=0.1)]
    if step:
        inputs.append(draw(B, W - 1, D))

    def call(backend: str, x, weight, bias, state=None):
        y, last = short_conv_op.short_conv(x, weight, bias, activation="silu", state=state, backend=backend)
        return (y, last) if step else y

    return Problem(call, inputs, 0)


def attention(kv_heads: int, window: int | None = None) -> Callable[..., Problem]:
    """Causal; a step sees T tokens and itself."""

    def make(draw: Draw, T: int, step: bool) -> Problem:
        B, H, D = draw.batch, 8, draw.head_dim
        keys = T + 1 if step else T
        inputs = [draw(B, 1 if step else T, H, D), draw(B, keys, kv_heads, D), draw(B, keys, kv_heads, D)]
        order: dict[str, Any] = {"q_index": draw.positions(1, T), "k_index": draw.positions(keys)} if step else {}

        def call(backend: str, q, k, v):
            return attention_op.attention(q, k, v, window=window, backend=backend, **order)[0]

        useful = keys * (1 if step else T) / (1 if step else 2)  # the causal half
        return Problem(call, inputs, int(4 * B * H * D * useful * (1 if window is None else min(1, 2 * window / T))))

    return make


def rope(draw: Draw, T: int, step: bool) -> Problem:
    """All channels of eight heads."""
    positions = draw.positions(T)
    inputs = [draw(draw.batch, T, 8, draw.head_dim)]
    return Problem(lambda backend, x: rope_op.rope(x, positions, backend=backend), inputs, 0)


def random_blocks(draw: Draw, T: int, heads: int, tile: int, block: int, density: float, batch: int) -> Tensor:
    """Ids of a random share of the causal blocks of each query tile, its own block among them; ascending, -1 at
    the end. Every row and head has the same number, so that the density is what it says."""
    tiles = -(-T // tile)
    last = (torch.arange(tiles) * tile + tile - 1).clamp(max=T - 1) // block  # the newest block a tile sees
    counts = ((last + 1) * density).ceil().long().clamp(min=1)
    scores = torch.rand(batch, heads, tiles, int(last[-1]) + 1, generator=draw.generator)
    index = torch.arange(scores.shape[-1])
    scores = torch.where(index == last[:, None], 2.0, torch.where(index < last[:, None], scores, -1.0))
    chosen = scores.topk(int(counts.max()), -1).indices
    kept = torch.arange(chosen.shape[-1]) < counts[:, None]
    ids = torch.where(kept, chosen, scores.shape[-1]).sort(-1).values
    return torch.where(ids < scores.shape[-1], ids, -1).int().to(draw.device)


def sparse_problem(draw: Draw, T: int, step: bool, *, heads: int, kv_heads: int, density: float, tile: int) -> Problem:
    """Sparse attention over a share of the causal blocks: of 128 by 128 and per head, or (tile 1) of 64 keys per
    token, shared by a group of heads."""
    B, D, block = draw.batch, draw.head_dim, 128 if tile > 1 else 64
    list_heads = heads if tile > 1 else kv_heads
    queries = 1 if step else T
    inputs = [draw(B, queries, heads, D), draw(B, T, kv_heads, D), draw(B, T, kv_heads, D)]
    idx = random_blocks(draw, T, list_heads, 1 if step else tile, block, density, B)
    if step:
        idx = idx[:, :, -1:]
    lists = sparse_attention_op.BlockList(idx, 1 if step else tile, block)
    order: dict[str, Any] = {"q_index": draw.positions(1, T - 1)} if step else {}

    def call(backend: str, q, k, v):
        return sparse_attention_op.sparse_attention(q, k, v, lists, backend=backend, **order)[0]

    # what is listed and visible: of a tile's own block the causal half
    pairs = int((idx >= 0).sum()) * block * lists.q_tile * (heads // list_heads)
    return Problem(call, inputs, 4 * D * (pairs - (0 if step else B * heads * T * min(tile, block) // 2)))


def sparse_attention(tile: int) -> Callable[..., Problem]:
    """A quarter of the causal blocks."""

    def make(draw: Draw, T: int, step: bool) -> Problem:
        return sparse_problem(draw, T, step, heads=8, kv_heads=8 if tile > 1 else 2, density=0.25, tile=tile)

    return make


def block_scores(draw: Draw, T: int, step: bool) -> Problem:
    """Eight heads against the keys of blocks of 64."""
    B, H, D, block = draw.batch, 8, draw.head_dim, 64
    N = -(-T // block)
    q_index, k_index = draw.positions(T), (draw.positions(N) + 1) * block - 1
    inputs = [draw(B, T, H, D), draw(B, N, 2, D)]

    def call(backend: str, q, keys):
        scores = block_scores_op.block_scores(q, keys, q_index=q_index, k_index=k_index, backend=backend)
        return torch.where(scores.isfinite(), scores, 0.0)

    return Problem(call, inputs, block_scores_op.flops(B, T, N, H, D))


def select(draw: Draw, T: int, step: bool) -> Problem:
    """The best 8 blocks of 64 for every token."""
    inputs = [draw.uniform(draw.batch, 2, T, max(T // 64, 1))]
    return Problem(lambda backend, s: select_op.select(s, 8, backend=backend).idx, inputs, 0)


def select_blocks(draw: Draw, T: int, step: bool) -> Problem:
    """The best 8 blocks of 64 for every token and head, from the keys of the blocks."""
    scores, block = block_scores(draw, T, step), 64
    q_index, k_index = draw.positions(T), (draw.positions(-(-T // block)) + 1) * block - 1

    def call(backend: str, q, keys):
        return select_blocks_op.select_blocks(q, keys, 8, q_index=q_index, k_index=k_index, backend=backend).idx

    return Problem(call, scores.inputs, scores.flops)


def monarch(draw: Draw, T: int, step: bool) -> Problem:
    """A square map of 32 by 32 blocks."""
    blocks, rows = 32, T * draw.batch
    width = 16 * draw.head_dim // blocks
    factors = [draw(blocks, width, width, scale=width**-0.5) for _ in range(2)]

    def call(backend: str, x, first, second):
        return block_linear_op.monarch(x, first, second, backend=backend)

    return Problem(call, [draw(rows, blocks * width), *factors], monarch_flops(rows, *[blocks, width, width] * 2))


def blast(draw: Draw, T: int, step: bool) -> Problem:
    """A square map of 8 by 8 blocks of rank 128."""
    blocks, rank, rows = 8, 128, T * draw.batch
    width = 16 * draw.head_dim // blocks
    u, v = (draw(blocks, width, rank, scale=width**-0.5) for _ in range(2))

    def call(backend: str, x, u, s, v):
        return block_linear_op.blast(x, u, s, v, backend=backend)

    inputs = [draw(rows, blocks * width), u, draw(blocks, blocks, rank, scale=0.1), v]
    return Problem(call, inputs, blast_flops(rows, blocks, width, blocks, width, rank))


def pool_blocks(draw: Draw, T: int, step: bool) -> Problem:
    """Means of 64 tokens."""
    inputs = [draw(draw.batch, T, 2, draw.head_dim)]
    return Problem(lambda backend, x: pool_blocks_op.pool_blocks(x, 64, backend=backend)[0], inputs, 0)


def prefix_topk(draw: Draw, T: int, step: bool) -> Problem:
    """The best 64 tokens after every 64."""
    inputs = [draw.uniform(draw.batch, T)]
    return Problem(lambda backend, s: prefix_topk_op.prefix_topk(s, 64, 64, backend=backend), inputs, 0)


def merge_lse(draw: Draw, T: int, step: bool) -> Problem:
    """Two sets of keys."""
    B, H, D = draw.batch, 8, draw.head_dim
    inputs = [*(draw(B, T, H, D) for _ in range(2)), *(draw(B, T, H, dtype=draw.wide) for _ in range(2))]

    def call(backend: str, a, b, lse_a, lse_b):
        return merge_lse_op.merge_lse([a, b], [lse_a, lse_b], backend=backend)[0]

    return Problem(call, inputs, 0)


def grouped_mm(draw: Draw, T: int, step: bool) -> Problem:
    """The first product of a mixture: eight experts, two a token."""
    rows, experts, K, M = 2 * T * draw.batch, 8, 8 * draw.head_dim, 32 * draw.head_dim
    counts = torch.bincount(draw.integers(experts, rows), minlength=experts)
    inputs = [draw(rows, K), draw(experts, K, M, scale=K**-0.5)]

    def call(backend: str, x, weight):
        return grouped_mm_op.grouped_mm(x, weight, counts, backend=backend)

    return Problem(call, inputs, grouped_mm_flops(rows, K, M))


def product_key(draw: Draw, T: int, step: bool) -> Problem:
    """Four heads, 16 of 128 x 128 slots each."""
    heads, n, width = 4, 128, 128
    inputs = [draw(T, heads, width), draw(heads, 2, n, width // 2), draw(n * n, 8 * draw.head_dim)]

    def call(backend: str, query, keys, values):
        return product_key_op.product_key_lookup(query, keys, values, 16, backend=backend)[0]

    return Problem(call, inputs, product_key_flops(T, heads, n, width))
