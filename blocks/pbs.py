"""PBS-Attn: keys are sorted by how much they are attended to, so that few blocks of them hold what matters.
Wang et al. 2025, arXiv:2510.21270.

    a_j  = mean over the last block of queries of segment g of softmax(q . K_g)_j     for the keys j of g
    the keys of g are put in the order of falling a and cut into blocks b
    p_b  = softmax_b(scale mean(q of the own block, up to t) . mean(K_b))              over blocks of earlier segments
    S(t) = the fewest b that hold tau of p, the block with the first token, and the own segment
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
    true_ids,
)
from zoo.contract import state_dtype
from zoo.kernels import sparse_attention as attending
from zoo.kernels import work
from zoo.kernels.block_list import BlockList, block_mask
from zoo.kernels.merge_lse import kept as merge_kept
from zoo.kernels.merge_lse import merge_lse
from zoo.kernels.precision import no_autocast
from zoo.kernels.select import select
from zoo.kernels.sparse_attention import sparse_attention
from zoo.registry import register
from zoo.schema import PositiveFloat, PositiveInt


@register(
    "pbs",
    kind="select",
    paper="arXiv:2510.21270",
    ops=("sparse_attention", "select", "merge_lse"),
    state_growth="linear",
    relations=(
        "attention(select={'pbs': {'block_size': 4, 'segment_size': 8, 'tau': 2.0}}) == attention()",
        "attention(select={'pbs': {'segment_size': 4096, 'block_size': 128}}) == attention()",
    ),
    examples=({"block_size": 4, "segment_size": 16, "tau": 0.5},),
)
class PermutedBlockSparse(Policy):
    """Each query head reads its own segment and the blocks of permuted keys that hold a share tau of block scores.

    The paper ranks the keys of all segments by the last block of queries of a prompt and decides for a block of
    queries at once, in prefill; it decodes densely. Here a segment is permuted when it ends, by its own last block of
    queries, and a token is decided for by the mean of its block's queries up to it. Blocks of the own segment are read
    in their order. Sorting changes nothing where all blocks are read: tau > 1 is attention, as is one segment.
    T^2 / block_size work for scores; keys and values are copied in their order for each query head, so decoding one
    token at a time costs more than dense attention. State: the permutations, and the queries of the last block.
    Useful: 4 H d FLOPs a causal pair, as if no block were left out, and scores of the blocks; how many are left out
    is the text's affair.
    """

    expectation = "pbs: every query reads all keys that it may"

    table_dtype = torch.int32

    def __init__(self, *, block_size: PositiveInt = 128, segment_size: PositiveInt = 256, tau: PositiveFloat = 0.9):
        if segment_size % block_size:
            raise ValueError(f"pbs: block_size={block_size} must divide segment_size={segment_size}")
        self.block_size, self.segment_size, self.tau = block_size, segment_size, tau
        self.memory = block_size - 1

    def prepare(self, whole: Part, k: Tensor, state: SelectState | None) -> tuple[KeyBlocks, Tensor, Tensor]:
        """Segments, the order of the keys of each [B, N, Hq, segment_size], the means of blocks [B, N * m, Hq, D]."""
        size = self.segment_size
        if state is None:
            segments = KeyBlocks(complete_blocks(whole.place, size, whole.doc_ids), size, whole.doc_ids)
            order = self._order(whole, k, segments.start)
        else:
            segments, new = cached_blocks(k, size), whole.new(whole.index)
            slots = new[:, :1] // size + torch.arange(-(-new.shape[1] // size), device=k.device)
            order = self.keep(state, self._order(whole, k, slots * size), slots, segments.start.shape[1])
        keys = self._permuted(k, segments, order)
        means = keys.to(state_dtype(k.dtype)).unflatten(1, (-1, self.block_size)).mean(2)
        return segments, order, means

    def _order(self, whole: Part, k: Tensor, start: Tensor) -> Tensor:
        """Keys of the segments at `start` [B, n] by falling attention of their last queries: [B, n, Hq, size]."""
        size, last = self.segment_size, self.block_size
        q = gather_blocks(whole.q, start + size - last - whole.index[:, :1], last)  # [B, n, last, Hq, D]
        keys, wide = gather_blocks(k, start, size), state_dtype(k.dtype)
        with no_autocast(k.device):
            rows = q.to(wide).transpose(2, 3).unflatten(2, (k.shape[2], -1)).flatten(3, 4)
            logits = (rows @ keys.to(wide).permute(0, 1, 3, 4, 2)).view(*start.shape, -1, last, size)
        place = torch.arange(size, device=k.device)
        hidden = place > place[size - last :, None]
        share = (logits * self.scale).masked_fill(hidden, float("-inf")).softmax(-1).mean(-2)
        return share.argsort(dim=-1, descending=True, stable=True).to(torch.int32)

    def _permuted(self, x: Tensor, segments: KeyBlocks, order: Tensor) -> Tensor:
        """Keys or values [B, S, Hkv, D] of all segments in their order, for each query head: [B, N * size, Hq, D]."""
        token = segments.start.clamp(min=0)[:, :, None, None] + order
        token = token.clamp(max=x.shape[1] - 1).transpose(2, 3).flatten(1, 2)  # [B, N * size, Hq]
        head = torch.arange(order.shape[2], device=x.device) // (order.shape[2] // x.shape[2])
        return x[torch.arange(x.shape[0], device=x.device)[:, None, None], token, head]

    def attend(
        self, part: Part, k: Tensor, v: Tensor, prepared: tuple[KeyBlocks, Tensor, Tensor], k_index: Tensor | None,
        k_doc_ids: Tensor | None, backend: str,
    ) -> Tensor:  # fmt: skip
        segments, order, means = prepared
        q, index = part.new(part.q), part.new(part.index)
        with torch.no_grad():
            none = index.new_zeros(*index.shape, 0)[:, None]
            own, blocks = segments.lists(none, part), self._earlier(part, segments, order, means)
        docs = {} if part.doc_ids is None else {"q_doc_ids": part.new(part.doc_ids), "k_doc_ids": k_doc_ids}
        near = sparse_attention(
            q, k, v, own, scale=self.scale, q_index=index, k_index=k_index, **docs, backend=backend
        )  # fmt: skip
        keys, values = (self._permuted(x, segments, order) for x in (k, v))
        far = sparse_attention(q, keys, values, blocks, causal=False, scale=self.scale, backend=backend)
        return merge_lse(*zip(near, far, strict=True))[0]

    def _earlier(self, part: Part, segments: KeyBlocks, order: Tensor, means: Tensor) -> BlockList:
        """Blocks of permuted keys that each query reads, among those of earlier segments of its document."""
        m, wide = self.segment_size // self.block_size, state_dtype(part.q.dtype)
        offset = part.place % self.block_size
        q = part.new(running_sum(part.q.to(wide), offset, self.block_size) / (offset + 1)[..., None, None])
        with no_autocast(q.device):
            scores = q.transpose(1, 2) @ means.permute(0, 2, 3, 1) * self.scale
        past = segments.past(part).repeat_interleave(m, -1)[:, None]
        best = select(scores, scores.shape[-1], rule="top_p", limit=self.tau, visible=past).idx
        # the block into which the first token of the document was sorted
        place = (order == 0).int().argmax(-1) // self.block_size  # [B, N, Hq]
        holds = (place[..., None] == torch.arange(m, device=q.device)).transpose(1, 2).flatten(2)[:, :, None]
        opening = segments.opening(part).repeat_interleave(m, -1)[:, None]
        chosen = past & (block_mask(best, scores.shape[-1]) | (opening & holds))
        return BlockList(true_ids(chosen), kv_block=self.block_size)

    def table_shape(self, num_keys: int) -> tuple[int, ...]:
        return (-(-num_keys // self.segment_size), self.num_heads, self.segment_size)

    def prepare_flops(self, batch_size: int, num_new: int, num_keys: int) -> int:
        segments = -(-num_new // self.segment_size)
        return 2 * batch_size * segments * self.num_heads * self.block_size * self.segment_size * self.head_dim

    def scoring_flops(self, batch_size: int, num_queries: int, num_new: int, num_keys: int) -> int:
        return 2 * batch_size * self.num_heads * num_new * self._blocks(num_keys) * self.head_dim

    def attend_flops(self, batch_size: int, num_queries: int, num_keys: int) -> int:
        H, D, blocks = self.num_heads, self.head_dim, self._blocks(num_keys)
        near = (num_keys, H, self.num_kv_heads, D, D, 1, self.segment_size, 1)
        far = (blocks * self.block_size, H, H, D, D, blocks, self.block_size, H)
        return sum(attending.flops(batch_size, num_queries, *sizes) for sizes in (near, far))

    def scores(self, num_queries: int, context_len: int) -> int:
        return self.num_heads * work.pairs(num_queries, context_len)

    def listed(self, num_keys: int) -> tuple[int, int, int]:
        return num_keys, 1, self.num_heads

    def kept(self, seq_len: int) -> int:
        # lists of both kinds; the other output and its denominators, what merging keeps, y; copies of k and v by index
        H, D = self.num_heads, self.head_dim
        token = 1 + H * (self._blocks(seq_len) + 1) + H * (2 * D + 1) + merge_kept(2, H, D)
        return seq_len * token + self._blocks(seq_len) * self.block_size * H * (2 * D + 4)

    def _blocks(self, num_keys: int) -> int:
        return -(-num_keys // self.segment_size) * (self.segment_size // self.block_size)
