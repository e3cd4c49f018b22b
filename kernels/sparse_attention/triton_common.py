"""What the Triton kernels of sparse_attention share: rows, keys, visibility, and the arguments of a launch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels import gpu

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NEVER = tl.constexpr(2147483647)  # order index of a key that nobody sees


@triton.jit
def rows_of(
    Offset, Pair, Groups, First, group, xs, tile, first_row, blocks, num_groups, pairs, n, Tq, list_head,
    Q_TILE: tl.constexpr, SHARED: tl.constexpr, M: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Of M rows: query, head, slot of the list (PAIRS) and which rows are real; and the block they share (PAIRS)."""
    ROWS: tl.constexpr = Q_TILE * SHARED
    row = first_row + tl.arange(0, M)
    block = 0
    slot = tl.zeros([M], tl.int32)
    if PAIRS:
        block = tl.load(Groups + xs * num_groups + group)
        begin = tl.load(Offset + xs * (blocks + 1) + block)
        end = tl.load(Offset + xs * (blocks + 1) + block + 1)
        row += (group - tl.load(First + xs * (blocks + 1) + block)) * M
        real = row < (end - begin) * ROWS
        pair = tl.load(Pair + xs * pairs + begin + row // ROWS, mask=real, other=0)
        slot = pair % n
        query = pair // n * Q_TILE + row % ROWS // SHARED
    else:
        real = row < ROWS
        query = tile * Q_TILE + row // SHARED
    return query, list_head * SHARED + row % SHARED, slot, real & (query < Tq), block


@triton.jit
def keys_at(Idx, j, block, n, Tk, KV_BLOCK: tl.constexpr, STRIDE: tl.constexpr, N: tl.constexpr, PAIRS: tl.constexpr):
    """Slots of k and v of the keys j .. j + N - 1 of a list (PAIRS: of a block), and which of them there are."""
    at = j + tl.arange(0, N)
    if PAIRS:
        key = block * STRIDE + at
        listed = at < KV_BLOCK
    elif KV_BLOCK % N == 0:
        start = tl.load(Idx + j // KV_BLOCK)
        key = start * STRIDE + j % KV_BLOCK + tl.arange(0, N)
        listed = (start >= 0) & (at >= 0)
    else:
        start = tl.load(Idx + at // KV_BLOCK, mask=at < n * KV_BLOCK, other=-1)
        key = start * STRIDE + at % KV_BLOCK
        listed = start >= 0
    return key, listed & (key < Tk)


@triton.jit
def order_of(KIndex, KDocs, b, Tk, key, listed, DOCS: tl.constexpr):
    """Order index of each key, NEVER where there is none, and its document."""
    order = tl.load(KIndex + b * Tk + key, mask=listed, other=-1).to(tl.int32)
    order = tl.where(order < 0, NEVER, order)
    doc = order.to(tl.int64)
    if DOCS:
        doc = tl.load(KDocs + b * Tk + key, mask=listed, other=0)
    return order, doc


@triton.jit
def sees(q_order, q_doc, order, doc, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DOCS: tl.constexpr):
    """Which pairs of a query and a key are visible; the arguments broadcast."""
    visible = order <= q_order if CAUSAL else order < NEVER
    if WINDOW:
        visible = visible & (q_order - order < window)
    if DOCS:
        visible = visible & (q_doc == doc)
    return visible


def padded(size: int) -> int:
    """A width that tl.dot takes."""
    return max(16, triton.next_power_of_2(size))


@dataclass
class Call:
    """Arguments of the op with what the kernels want to know besides."""

    q: Tensor
    k: Tensor
    v: Tensor
    idx: Tensor
    q_index: Tensor
    k_index: Tensor
    q_doc_ids: Tensor | None
    k_doc_ids: Tensor | None
    k_bias: Tensor | None
    q_tile: int
    kv_block: int
    stride: int
    causal: bool
    window: int | None
    scale: float

    def __post_init__(self):
        self.q, self.k, self.v = (x if x.stride(-1) == 1 else x.contiguous() for x in (self.q, self.k, self.v))
        self.idx = self.idx.contiguous()
        of_tokens = (self.q_index, self.k_index, self.q_doc_ids, self.k_doc_ids, self.k_bias)
        of_tokens = (None if x is None else x.contiguous() for x in of_tokens)
        self.q_index, self.k_index, self.q_doc_ids, self.k_doc_ids, self.k_bias = of_tokens
        self.B, self.Tq, self.Hq, self.D = self.q.shape
        self.Tk, self.Hkv, self.Dv = self.v.shape[1:]
        _, self.Hs, self.tiles, self.n = self.idx.shape
        self.list_heads = self.Hq if self.Hs > self.Hkv else self.Hkv
        self.rows = self.q_tile * self.Hq // self.list_heads  # rows of a tile
        self.blocks = -(-self.Tk // self.stride)
        self.half = self.q.dtype != torch.float32

    @property
    def by_pairs(self) -> bool:
        """Is it worth bringing queries to keys? A tile alone would fill less than half a product, and a block is
        listed often enough to fill one."""
        return self.rows < 8 and self.kv_block >= 16 and self.tiles * self.n * self.kv_block >= 16 * self.Tk

    def masks(self) -> tuple[Tensor | None, ...]:
        return self.q_index, self.k_index, self.q_doc_ids, self.k_doc_ids, self.k_bias

    def strides(self) -> tuple[int, ...]:
        return *self.q.stride()[:3], *self.k.stride()[:3], *self.v.stride()[:3]

    def constants(self) -> dict[str, int | bool | str]:
        return {
            "HEADS": self.Hq, "KV_HEADS": self.Hkv, "LIST_HEADS": self.list_heads, "INDEX_HEADS": self.Hs,
            "D": self.D, "DV": self.Dv, "DP": padded(self.D), "DVP": padded(self.Dv),
            "Q_TILE": self.q_tile, "KV_BLOCK": self.kv_block, "STRIDE": self.stride, "CAUSAL": self.causal,
            "WINDOW": self.window is not None, "DOCS": self.q_doc_ids is not None, "BIAS": self.k_bias is not None,
            "PRECISION": "tf32" if self.half else "ieee",
        }  # fmt: skip

    def options(self, kernel: str, configs: Callable[[int, bool, int], list[dict[str, int]]], rows: int) -> dict:
        """Tuned options for tiles of `rows` rows; M and N are cut to what there is."""
        width = max(padded(self.D), padded(self.Dv))
        sizes = {"rows": min(128, padded(rows)), "width": width, "kv_block": self.kv_block, "pairs": int(self.by_pairs)}
        found = dict(gpu.options(kernel, self.q, configs(width, self.half, sizes["rows"]), **sizes))
        found["M"] = min(found["M"], sizes["rows"])
        found["N"] = min(found["N"], padded(self.kv_block * self.n))
        return found
