"""BlockLists seen from the keys, by torch operations that never wait for the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

_BITS = 64  # keys of one cell at most: one bit of an int64 each


@dataclass
class Inverted:
    """Who listed which keys. The keys are cut into cells; cell j is listed by the query tiles
    tile[x, offset[x, j] : offset[x, j + 1]] for row x of B * Hs, each tile once, ascending."""

    offset: Tensor  # int32 [B * Hs, cells + 1]
    tile: Tensor  # int32 [B * Hs, entries]
    bits: Tensor | None  # int64 [B * Hs, entries]: which keys of the cell; None: all of them
    size: int  # keys of a cell


def _counts(block: Tensor, blocks: int) -> Tensor:
    """How often each of 0 .. blocks - 1 occurs in the rows of `block`."""
    count = block.new_zeros(block.shape[0], blocks + 1)
    return count.scatter_add_(1, block, torch.ones_like(block))[:, :blocks]


def _offsets(count: Tensor) -> Tensor:
    return F.pad(count.cumsum(1), (1, 0)).int()


def by_block(idx: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """Pairs (tile, slot) sorted by block: offset int32 [B * Hs, blocks + 1] and pair int32 [B * Hs, tiles * n]."""
    flat = idx.flatten(0, 1).flatten(1).long()
    block, pair = torch.where(flat >= 0, flat, blocks).sort(dim=1, stable=True)
    return _offsets(_counts(block, blocks)), pair.int()


def groups_of(offset: Tensor, rows: int, size: int, pairs: int) -> tuple[Tensor, Tensor]:
    """Cut the rows of each block into groups of at most `size`: block int32 [X, groups] of each group (= blocks:
    there is no such group) and the number int32 [X, blocks + 1] of groups before each block. Pairs have `rows` rows."""
    blocks = offset.shape[1] - 1
    count = (offset[:, 1:] - offset[:, :-1]).long() * rows
    first = _offsets((count + size - 1).div(size, rounding_mode="floor"))
    # sum_j ceil(c_j / size) <= sum_j c_j / size + blocks, whatever was listed
    groups = pairs * rows // size + min(blocks, pairs)
    number = torch.arange(groups, device=offset.device, dtype=torch.int32).expand(offset.shape[0], groups).contiguous()
    return torch.searchsorted(first[:, 1:].contiguous(), number, right=True, out_int32=True), first


def invert(idx: Tensor, num_keys: int, kv_block: int, stride: int) -> Inverted:
    """Cells are the blocks where blocks tile the keys in a handy size. Else they are 32 or 64 consecutive keys, and a
    tile that lists several blocks in one cell enters it once, with a bit for each listed key."""
    n = idx.shape[3]
    if stride == kv_block and kv_block % 16 == 0:
        offset, pair = by_block(idx, -(-num_keys // kv_block))
        return Inverted(offset, pair // n, None, kv_block)
    size = _BITS // 2 if kv_block < _BITS // 2 else _BITS
    cells = -(-num_keys // size)
    flat = idx.flatten(0, 1).flatten(1).long()  # [X, tiles * n]
    start = flat * stride
    aligned = stride == kv_block and size % kv_block == 0
    reach = torch.arange(1 if aligned else (kv_block - 2) // size + 2, device=idx.device)
    cell = start[..., None] // size + reach  # a block meets this many cells at most
    low = (start[..., None] - cell * size).clamp(min=0)
    high = (start[..., None] + kv_block - cell * size).clamp(max=size)
    some = (flat >= 0)[..., None] & (high > low) & (cell < cells)
    bits = _below(high) - _below(low)
    cell, order = torch.where(some, cell, cells).flatten(1).sort(dim=1, stable=True)
    tile = order // (n * len(reach))
    bits = torch.where(some, bits, 0).flatten(1).gather(1, order)
    # the stable sort leaves the blocks of a tile in a cell side by side
    new = F.pad((cell[:, 1:] != cell[:, :-1]) | (tile[:, 1:] != tile[:, :-1]), (1, 0), value=True)
    entry = new.cumsum(1) - 1
    offset = _offsets(_counts(torch.where(new, cell, cells), cells))
    tiles = torch.zeros_like(tile).scatter_(1, entry, tile).int()
    return Inverted(offset, tiles, torch.zeros_like(bits).scatter_add_(1, entry, bits), size)


def _below(n: Tensor) -> Tensor:
    """The lowest n bits set, 0 <= n <= 64."""
    one = torch.ones_like(n)
    return torch.where(n >= _BITS, -one, (one << n.clamp(max=_BITS - 1)) - 1)
