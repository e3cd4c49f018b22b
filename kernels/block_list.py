"""BlockList: which key blocks each query tile attends to. The one thing that every selection rule emits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class BlockList:
    """idx: int32 [B, Hs, Nq, n], ids of key blocks in ascending order, -1 = empty slot (at the end).

    Hs is 1, Hkv or Hq: the list is shared by the heads that are missing. Entry (b, h, i) serves the queries
    i*q_tile .. (i+1)*q_tile - 1; block j holds the keys j*stride .. j*stride + kv_block - 1 (those that
    exist). stride = kv_block tiles the keys; stride = 1 lets blocks start anywhere (packed documents).
    Ids must not repeat within a list and listed blocks must not overlap: a key would count once per listing
    in one implementation and once in another.
    """

    idx: Tensor
    q_tile: int = 1
    kv_block: int = 1
    stride: int = 0

    def __post_init__(self):
        if self.idx.dim() != 4:
            raise ValueError(f"idx must be [B, Hs, Nq, n], got a shape of {tuple(self.idx.shape)}")
        self.stride = self.stride or self.kv_block

    @property
    def counts(self) -> Tensor:
        """Listed blocks, int32 [B, Hs, Nq]."""
        return (self.idx >= 0).sum(-1, dtype=torch.int32)

    def num_blocks(self, num_keys: int) -> int:
        """Blocks there are over `num_keys` keys."""
        return -(-num_keys // self.stride)

    def mask(self, num_keys: int) -> Tensor:
        """Which keys are listed: bool [B, Hs, Nq, num_keys]."""
        blocks = self.num_blocks(num_keys)
        listed = block_mask(self.idx, blocks)
        if self.stride == self.kv_block:
            return listed.repeat_interleave(self.kv_block, -1)[..., :num_keys]
        # key u is listed where more blocks have started than ended up to u
        edges = listed.new_zeros(*listed.shape[:-1], blocks * self.stride + self.kv_block, dtype=torch.int32)
        edges[..., : blocks * self.stride : self.stride] += listed
        edges[..., self.kv_block : self.kv_block + blocks * self.stride : self.stride] -= listed.int()
        return (edges.cumsum(-1) > 0)[..., :num_keys]

    def transpose(self, num_keys: int) -> tuple[Tensor, Tensor]:
        """The key-major form: (col_offset int64 [B, Hs, num_blocks + 1], row_idx int32 [B, Hs, Nq * n]).

        Block j is listed by the query tiles row_idx[col_offset[j]:col_offset[j+1]], ascending; what lies
        behind the last offset is -1.
        """
        B, H, N, n = self.idx.shape
        blocks = self.num_blocks(num_keys)
        flat = self.idx.reshape(B, H, N * n).long()
        key = torch.where(flat >= 0, flat, blocks)
        order = key.sort(dim=-1, stable=True)
        row = torch.where(order.values < blocks, order.indices // n, -1).int()
        count = torch.zeros(B, H, blocks + 1, dtype=torch.int64, device=flat.device)
        count.scatter_add_(-1, key, torch.ones_like(key))
        offset = torch.nn.functional.pad(count[..., :blocks].cumsum(-1), (1, 0))
        return offset, row


def block_mask(idx: Tensor, num_blocks: int) -> Tensor:
    """Listed ids as a bool mask [..., num_blocks]."""
    mask = torch.zeros(*idx.shape[:-1], num_blocks + 1, dtype=torch.bool, device=idx.device)
    slot = torch.where(idx >= 0, idx, num_blocks).long()
    return mask.scatter(-1, slot, True)[..., :num_blocks]


def sort_ids(idx: Tensor) -> Tensor:
    """Ids in ascending order with the empty slots (-1) at the end, as int32."""
    last = torch.iinfo(torch.int32).max
    idx = torch.where(idx >= 0, idx, last).int().sort(dim=-1).values
    return torch.where(idx == last, -1, idx)
