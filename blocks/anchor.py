"""AnchorAttention: single keys whose scores come within a margin of the largest score nearby.
Zhang et al. 2025, arXiv:2505.23520.

    A(t) = [0, init) + [start of the own super-block, t]          a super-block is `step` rows of block_size tokens
    m_t  = max_{j in A(t)} s q_t . k_j,   qbar_r, mbar_r = means of q and m over the tokens of row r
    kept = keys j outside A with s qbar_r . k_j + theta >= mbar_r for a row r of the super-block
    o_t  = softmax(s q_t . K[A + kept]) V[A + kept]
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.blocks.selection import (
    SCORES_AT_ONCE,
    Part,
    Policy,
    SelectState,
    complete_blocks,
    gather_blocks,
    running_sum,
    true_ids,
)
from zoo.contract import state_dtype
from zoo.kernels.block_list import BlockList
from zoo.kernels.precision import no_autocast
from zoo.registry import register
from zoo.schema import PositiveInt


@register(
    "anchor",
    kind="select",
    paper="arXiv:2505.23520",
    ops=("sparse_attention",),
    state_growth="linear",
    relations=(
        "attention(select={'anchor': {'block_size': 4, 'step': 2, 'init': 4, 'theta': 1000000.0}}) == attention()",
        "attention(select={'anchor': {}}) == attention()",
    ),
    examples=({"block_size": 4, "step": 3, "init": 5, "theta": 0.5},),
)
class Anchor(Policy):
    """Each query head reads the first keys, its own super-block, and single keys that rival the best of these.

    A key is kept for all queries of a super-block of `step` rows of block_size tokens where the mean query of one of
    these rows scores it within theta of the row's mean anchor (in natural-log units). The paper decides for a
    super-block at once, in prefill, and decodes densely. Here a token counts the rows that are complete when it comes,
    or those of the super-block before while its own has none, so a super-block's last token decides as in the paper.
    The sets are disjoint, as the paper writes them; its kernel counts some keys twice and leaves 128 out.
    T (init + block_size step) + T^2 / block_size work for anchors and scores; the key lists are written out, T numbers
    a query. State: mean query and anchor of every row, the last row's queries. A large theta is attention.
    Useful: 4 H d FLOPs a causal pair, as if no key were left out, and the products that find anchors; how many keys
    are left out is the text's affair.
    """

    expectation = "anchor: every query reads all keys that it may"

    def __init__(
        self, *, block_size: PositiveInt = 128, step: PositiveInt = 16, init: PositiveInt = 128, theta: float = 12.0
    ):
        self.block_size, self.step, self.init, self.theta = block_size, step, init, theta
        self.memory = block_size - 1

    @property
    def _super(self) -> int:
        return self.block_size * self.step

    def prepare(self, whole: Part, k: Tensor, state: SelectState | None) -> tuple[Tensor, Tensor]:
        """First slot of each row [B, N], and which keys the rows of its super-block up to it keep [B, N, Hq, S]."""
        size = self.block_size
        if state is None:
            start = complete_blocks(whole.place, size, whole.doc_ids)
            place = whole.place.gather(1, start.clamp(min=0))
            rows = self._rows(whole.q, start, k, start, start - place)
        else:
            new = whole.new(whole.index)
            slots = new[:, :1] // size + torch.arange(-(-new.shape[1] // size), device=k.device)
            rows = self._rows(whole.q, slots * size - whole.index[:, :1], k, slots * size, torch.zeros_like(slots))
            rows = self.keep(state, rows, slots, -(-k.shape[1] // size))
            # only the rows of the super-blocks in which new tokens stand, and of the one before
            row = (new[:, :1] // self._super - 1).clamp(min=0) * self.step
            row = row + torch.arange(self._near(new.shape[1], rows.shape[1]), device=k.device)
            place = start = torch.where(row < rows.shape[1], row * size, -1)
            rows = rows[torch.arange(len(k), device=k.device)[:, None], row.clamp(max=rows.shape[1] - 1)]
        wide = state_dtype(k.dtype)
        with no_autocast(k.device):
            q = rows[..., :-1].to(wide).transpose(1, 2).unflatten(1, (k.shape[2], -1)).flatten(2, 3)
            scores = (q @ k.to(wide).permute(0, 2, 3, 1)).view(len(k), rows.shape[2], rows.shape[1], -1)
        kept = scores * self.scale + self.theta >= rows[..., -1].to(wide).transpose(1, 2)[..., None]
        kept = kept.transpose(1, 2) & (start >= 0)[..., None, None]
        return start, running_sum(kept.int(), place // size % self.step, self.step) > 0

    def _rows(self, q: Tensor, at: Tensor, k: Tensor, start: Tensor, first: Tensor) -> Tensor:
        """Mean queries and anchors [B, n, Hq, D + 1] of rows that start at `at` among the queries, `start` among the
        keys, in documents that start at `first` [B, n]."""
        size, wide, (init, reach) = self.block_size, state_dtype(q.dtype), self._read(k.shape[1])
        batch, inside = torch.arange(len(k), device=k.device)[:, None, None], torch.arange(size, device=k.device)
        opening, near = (torch.arange(n, device=k.device) for n in (init, reach))
        step = max(1, SCORES_AT_ONCE // (len(q) * q.shape[2] * size * (init + reach)))
        means = []
        for row, key, begin in zip(*(x[..., None].split(step, 1) for x in (at, start, first)), strict=True):
            queries = gather_blocks(q, row[..., 0], size).to(wide)  # [B, n, size, Hq, D]
            above = begin + (key - begin) // self._super * self._super
            slot = torch.cat([begin + opening, above + near], -1)
            seen = (slot[:, :, None] <= (key + inside)[..., None])[:, :, None]
            keys = k[batch, slot.clamp(0, k.shape[1] - 1)].to(wide)  # [B, n, init + reach, Hkv, D]
            with no_autocast(k.device):
                rows = queries.transpose(2, 3).unflatten(2, (k.shape[2], -1)).flatten(3, 4)
                logits = (rows @ keys.permute(0, 1, 3, 4, 2)).view(*row.shape[:2], q.shape[2], size, -1) * self.scale
            anchor = logits.masked_fill(~seen, float("-inf")).amax(-1).mean(-1)
            means.append(torch.cat([queries.mean(2), anchor[..., None]], -1))
        return torch.cat(means, 1).to(k.dtype)

    def blocks(self, part: Part, prepared: tuple[Tensor, Tensor]) -> BlockList:
        start, kept = prepared
        index, place, size = part.new(part.index), part.new(part.place), self.block_size
        slot = torch.arange(kept.shape[-1], device=kept.device)
        row = index - (place + 1) % size - size + 1  # the last that is complete
        found = (row[..., None] == start[:, None]) & (place + 1 >= size)[..., None]
        kept = kept[torch.arange(len(kept), device=kept.device)[:, None], found.int().argmax(-1)]  # [B, T, Hq, S]
        kept = kept & found.any(-1)[..., None, None]
        first, above = (index - place)[..., None], (index - place % self._super)[..., None]
        near = ((slot >= first) & (slot < first + self.init)) | (slot >= above)
        middle = (slot >= first + self.init) & (slot < above)
        chosen = (near[:, :, None] | (middle[:, :, None] & kept)) & (slot <= index[..., None])[:, :, None]
        return BlockList(true_ids(chosen.transpose(1, 2)))

    def _near(self, num_new: int, num_rows: int) -> int:
        return min(2 * self.step + -(-num_new // self.block_size), num_rows)

    def _read(self, num_keys: int) -> tuple[int, int]:
        """First keys and keys of a super-block that a row reads for its anchor."""
        return min(self.init, num_keys), min(self._super, num_keys)

    def table_shape(self, num_keys: int) -> tuple[int, ...]:
        return (-(-num_keys // self.block_size), self.num_heads, self.head_dim + 1)

    def prepare_flops(self, batch_size: int, num_new: int, num_keys: int) -> int:
        rows = -(-num_new // self.block_size)
        anchors = rows * self.block_size * sum(self._read(num_keys))
        scores = self._near(num_new, -(-num_keys // self.block_size)) * num_keys
        return 2 * batch_size * self.num_heads * (anchors + scores) * self.head_dim

    def scoring_flops(self, batch_size: int, num_queries: int, num_new: int, num_keys: int) -> int:
        return 0

    def listed(self, num_keys: int) -> tuple[int, int, int]:
        return num_keys, 1, self.num_heads
