"""XAttention: blocks of keys by the antidiagonal sums of their scores, as many as hold a share of the mass.
Xu et al. 2025, arXiv:2503.16428.

    Qf_i = [q_{iS+S-1} .. q_{iS}],  Kf_j = [k_{jS} .. k_{jS+S-1}]      groups of S = stride tokens
    A_ij = softmax_{j <= i}(Qf_i . Kf_j scale / S)                     each logit the sum of an antidiagonal of q k^T
    M_b  = sum of A_ij over the groups i of the queries' block and j of block b
    S(t) = {first block, own block}, then the largest M_b while those before hold less than tau of the mass
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.blocks.selection import (
    KeyBlocks,
    Part,
    Policy,
    SelectState,
    cached_blocks,
    complete_blocks,
    gather_blocks,
    running_sum,
)
from zoo.contract import state_dtype
from zoo.kernels.block_list import BlockList
from zoo.kernels.precision import no_autocast
from zoo.kernels.select import select
from zoo.registry import register
from zoo.schema import PositiveFloat, PositiveInt


@register(
    "xattention",
    kind="select",
    paper="arXiv:2503.16428",
    ops=("sparse_attention", "select"),
    state_growth="linear",
    relations=("attention(select={'xattention': {'block_size': 8, 'stride': 4, 'tau': 2.0}}) == attention()",),
    examples=({"block_size": 16, "stride": 4, "tau": 0.7},),
)
class XAttention(Policy):
    """Each query head reads the blocks that hold a share tau of the mass of antidiagonal sums, first and own included.

    The paper decides for a block of queries at once, in prefill, and decodes densely. Here a token knows what came
    before it: it counts the groups of `stride` queries of a block that are complete when it comes, or those of the
    block before while its own has none, so a block's last token decides as the paper's block does.
    T^2 / stride work for scores, the same for each of block_size / stride decoded groups: cheap in prefill, dearer than
    dense attention in decoding one token at a time. State: the queries of the last block and stride. tau > 1 is
    attention.
    Useful: 4 H d FLOPs a causal pair, as if no block were left out, and the antidiagonal sums; how many are left
    out is the text's affair.
    """

    expectation = "xattention: every query reads all keys that it may"

    def __init__(self, *, block_size: PositiveInt = 128, stride: PositiveInt = 16, tau: PositiveFloat = 0.9):
        if block_size % stride:
            raise ValueError(f"xattention: stride={stride} must divide block_size={block_size}")
        self.block_size, self.stride, self.tau = block_size, stride, tau
        self.memory = block_size + stride - 2

    def prepare(self, whole: Part, k: Tensor, state: SelectState | None) -> tuple[KeyBlocks, KeyBlocks, Tensor]:
        """Blocks, groups, and the folded keys [B, groups, stride, Hkv, D]."""
        if state is None:
            blocks, groups = (
                KeyBlocks(complete_blocks(whole.place, n, whole.doc_ids), n, whole.doc_ids)
                for n in (self.block_size, self.stride)
            )
        else:
            blocks, groups = cached_blocks(k, self.block_size), cached_blocks(k, self.stride)
        return blocks, groups, gather_blocks(k, groups.start, self.stride)

    def blocks(self, part: Part, prepared: tuple[KeyBlocks, KeyBlocks, Tensor]) -> BlockList:
        blocks, groups, folded = prepared
        S, B, N = self.stride, part.q.shape[0], blocks.start.shape[1]
        first = complete_blocks(part.place, S, part.doc_ids)  # of the groups of queries
        at = first.clamp(min=0)
        place, index = part.place.gather(1, at), part.index.gather(1, at)
        real = (first >= 0) & (place >= 0)
        seen = (groups.start >= 0)[:, None] & (groups.start[:, None] <= index[..., None]) & real[..., None]
        if part.doc_ids is not None and groups.k_doc_ids is not None:
            ids = groups.k_doc_ids.gather(1, groups.start.clamp(min=0))
            seen = seen & (ids[:, None] == part.doc_ids.gather(1, at)[..., None])
        share = self._share(gather_blocks(part.q, first, S), folded, seen)  # [B, Hq, groups, groups of keys]
        inside = blocks.start.clamp(min=0)[..., None] // S + torch.arange(self.block_size // S, device=at.device)
        inside = inside.flatten(1).clamp(max=share.shape[-1] - 1)[:, None, None].expand(*share.shape[:3], -1)
        mass = share.gather(-1, inside).unflatten(-1, (N, -1)).sum(-1).transpose(1, 2)  # [B, groups, Hq, N]
        count = torch.where(real, place % self.block_size // S, 0)
        mass = running_sum(mass, count, self.block_size // S)
        # the last group that is complete when a token comes
        token = torch.arange(part.q.shape[1], device=at.device) - (part.place + 1) % S - S + 1
        slot = part.new(token).clamp(min=0) // S
        row = torch.arange(B, device=at.device)[:, None]
        past = blocks.past(part)
        mass = mass[row, slot].transpose(1, 2)
        mass = torch.where(past[:, None], mass, 0)  # [B, Hq, T, N]
        total = (count + 1).gather(1, slot)[:, None, :, None]  # each group has a mass of 1
        mass = torch.cat([mass, total - mass.sum(-1, keepdim=True)], -1)  # the own block last
        always = torch.ones_like(past[..., :1])
        best = select(
            mass.clamp(min=torch.finfo(mass.dtype).tiny).log(), N + 1, rule="top_p", limit=self.tau,
            forced=torch.cat([blocks.opening(part), always], -1)[:, None],
            visible=torch.cat([past, always], -1)[:, None],
        ).idx  # fmt: skip
        return blocks.lists(torch.where(best == N, -1, best), part)

    def _share(self, q: Tensor, k: Tensor, seen: Tensor) -> Tensor:
        """Softmax [B, Hq, M, N] of the folded products of q [B, M, S, Hq, D] and k [B, N, S, Hkv, D], both in order."""
        wide = state_dtype(q.dtype)
        rows = q.flip(2).to(wide).permute(0, 3, 1, 2, 4).flatten(3)
        with no_autocast(q.device):
            rows = rows.unflatten(1, (k.shape[3], -1)).flatten(2, 3)
            logits = rows @ k.to(wide).permute(0, 3, 2, 4, 1).flatten(2, 3)
        logits = logits.view(q.shape[0], q.shape[3], q.shape[1], -1) * (self.scale / self.stride)
        seen = seen[:, None]
        return torch.where(seen, logits.masked_fill(~seen, float("-inf")).softmax(-1), 0)

    def scoring_flops(self, batch_size: int, num_queries: int, num_new: int, num_keys: int) -> int:
        groups, of_keys = -(-num_queries // self.stride), -(-num_keys // self.stride)
        return 2 * batch_size * self.num_heads * groups * of_keys * self.stride * self.head_dim

    def listed(self, num_keys: int) -> tuple[int, int, int]:
        return -(-num_keys // self.block_size) + 2, self.block_size, self.num_heads
