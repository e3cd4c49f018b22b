"""Selection policies: which keys each query of `attention` reads. `select: quest`, or `select: {quest: {top_k: 8}}`.

A policy is one file: a subclass of `Policy`, registered with kind="select", its options the keywords of its
constructor. It has no parameters and no gradient, so any trained attention can take it. The law of a block holds: a
choice depends on the query and on tokens before it, `memory` queries back at most, never on how the sequence is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.blocks.compression import write_slots
from zoo.blocks.kv_cache import KVCache
from zoo.contract import State, positions_from
from zoo.kernels import sparse_attention as attending
from zoo.kernels import work
from zoo.kernels.block_list import BlockList, sort_ids
from zoo.kernels.sparse_attention import sparse_attention
from zoo.segments import handed_on

SCORES_AT_ONCE = 1 << 24  # pairs of a query and a key, for some queries


@dataclass
class SelectState(State):
    """The key-value cache, the last queries [B, memory, Hq, D] and what the policy keeps of the blocks of keys
    [B, slots, ...], if anything."""

    cache: KVCache
    tail: Tensor
    table: Tensor


@dataclass
class Part:
    """Some queries q [B, lead + T, Hq, D], of which the first `lead` only help to decide for the others: `index`, the
    slot of each among the keys, and `place`, that in its document [B, lead + T]; doc_ids of these or None."""

    q: Tensor
    index: Tensor
    place: Tensor
    doc_ids: Tensor | None
    lead: int

    def new(self, x: Tensor) -> Tensor:
        """What belongs to the queries that are decided for."""
        return x[:, self.lead :]


@dataclass
class KeyBlocks:
    """Complete blocks of `size` keys: the slot of the first key of each [B, N], -1 for none, in documents k_doc_ids
    [B, S]. Among a cache's blocks those that are not complete may be named too; they are not past for any query."""

    start: Tensor
    size: int
    k_doc_ids: Tensor | None = None

    def own(self, part: Part) -> Tensor:
        """First token [B, T] of the block that a query stands in."""
        return part.new(part.index - part.place % self.size)

    def past(self, part: Part) -> Tensor:
        """Which blocks end before the own one, in the same document: bool [B, T, N]."""
        past = (self.start >= 0)[:, None] & (self.start[:, None] < self.own(part)[..., None])
        if part.doc_ids is None or self.k_doc_ids is None:
            return past
        ids = self.k_doc_ids.gather(1, self.start.clamp(min=0))
        return past & (ids[:, None] == part.new(part.doc_ids)[..., None])

    def masks(self, part: Part) -> dict[str, Any]:
        """The same for `block_scores` and `select_blocks`."""
        end = torch.where(self.start >= 0, self.start + self.size - 1, -1)
        index = part.new(part.index)
        if part.doc_ids is None or self.k_doc_ids is None:
            return {"q_index": index, "k_index": end}
        ids = self.k_doc_ids.gather(1, self.start.clamp(min=0))
        return {"q_index": index, "k_index": end, "q_doc_ids": part.new(part.doc_ids), "k_doc_ids": ids}

    def opening(self, part: Part) -> Tensor:
        """Which block is the first of a query's document: bool [B, T, N]."""
        return self.start[:, None] == part.new(part.index - part.place)[..., None]

    def lists(self, best: Tensor, part: Part) -> BlockList:
        """The blocks `best` [B, H, T, n] (-1: none) and the own one."""
        table = self.start[:, None, None].expand(-1, *best.shape[1:3], -1)
        start = torch.where(best >= 0, table.gather(-1, best.clamp(min=0).long()), -1)
        start = torch.cat([start, self.own(part)[:, None, :, None].expand(-1, best.shape[1], -1, 1)], -1)
        start = sort_ids(start)
        if part.doc_ids is not None:  # blocks start anywhere and are named by their first token
            return BlockList(start, kv_block=self.size, stride=1)
        return BlockList(start.div(self.size, rounding_mode="floor"), kv_block=self.size)


def complete_blocks(place: Tensor, size: int, doc_ids: Tensor | None = None) -> Tensor:
    """Where each complete block of tokens at `place` [B, T] of their documents starts: [B, ceil(T / size)], -1 for
    none; slot j holds the one that starts in [j size, (j + 1) size)."""
    T = place.shape[1]
    slots = -(-T // size)
    opens = place % size == 0
    last = torch.arange(T, device=place.device) + size - 1
    opens = opens & (last < T)
    if doc_ids is not None:
        opens = opens & (doc_ids.gather(1, last.clamp(max=T - 1).expand_as(doc_ids)) == doc_ids)
    opens = F.pad(opens, (0, slots * size - T), value=False).unflatten(1, (slots, size))
    offset = torch.where(opens, torch.arange(size, device=place.device), -1).amax(-1)
    return torch.where(offset >= 0, offset + torch.arange(slots, device=place.device) * size, -1)


def cached_blocks(k: Tensor, size: int) -> KeyBlocks:
    """The blocks of a cache k [B, S, ...], complete or not."""
    start = torch.arange(-(-k.shape[1] // size), device=k.device) * size
    return KeyBlocks(start.expand(k.shape[0], -1), size)


def gather_blocks(x: Tensor, start: Tensor, size: int) -> Tensor:
    """Tokens [B, N, size, ...] of the blocks of x [B, S, ...] that start at `start`; any tokens beyond the end."""
    token = start.clamp(min=0)[..., None] + torch.arange(size, device=x.device)
    row = torch.arange(x.shape[0], device=x.device)[:, None, None]
    return x[row, token.clamp(max=x.shape[1] - 1)]


def running_sum(x: Tensor, offset: Tensor, size: int) -> Tensor:
    """Sum of x [B, T, ...] over a token and the offset [B, T] < size tokens before it. The order of additions depends
    on the offset alone, so the numbers are the same however a sequence is cut."""
    shift = 1
    while shift < size:
        before = F.pad(x, (0, 0) * (x.dim() - 2) + (shift, 0))[:, : x.shape[1]]
        reaches = (offset >= shift).view(*offset.shape, *[1] * (x.dim() - 2))
        x = x + torch.where(reaches, before, 0)
        shift *= 2
    return x


def true_ids(mask: Tensor) -> Tensor:
    """Where the last dimension [..., N] of a mask is true, ascending, then -1: int32 [..., N]. No sorting."""
    place = torch.where(mask, mask.cumsum(-1), 0)  # from 1 on; the first slot takes the rest
    ids = torch.arange(mask.shape[-1], device=mask.device, dtype=torch.int32).expand_as(mask)
    out = torch.full((*mask.shape[:-1], mask.shape[-1] + 1), -1, dtype=torch.int32, device=mask.device)
    return out.scatter_(-1, place, ids)[..., 1:]


class Policy:
    """Base of selection policies: what it keeps of blocks of keys, and the lists of blocks that queries read."""

    memory: int = 0  # earlier queries that a choice depends on
    table_dtype: torch.dtype | None = None  # of what it keeps of keys; None: that of the keys
    by_head: bool = False  # whether it tells heads apart by their numbers
    expectation: str = (
        ""  # in words, what costs take for granted where the text decides which and how many keys are read
    )
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float

    def bind(self, num_heads: int, num_kv_heads: int, head_dim: int, scale: float) -> None:
        """Called once by the block that it selects for; scores are multiplied by `scale`."""
        self.num_heads, self.num_kv_heads, self.head_dim, self.scale = num_heads, num_kv_heads, head_dim, scale

    # ------------------------------------------------------------------------------ what a policy says
    def prepare(self, whole: Part, k: Tensor, state: SelectState | None) -> Any:
        """What it needs to know of all keys k [B, S, Hkv, D] for all queries; a state is brought up to date."""
        raise NotImplementedError

    def blocks(self, part: Part, prepared: Any) -> BlockList:
        """The lists of a part's new queries."""
        raise NotImplementedError

    def table_shape(self, num_keys: int) -> tuple[int, ...]:
        """Shape, but for the batch, of what it keeps of `num_keys` keys."""
        return (0,)

    def scoring_flops(self, batch_size: int, num_queries: int, num_new: int, num_keys: int) -> int:
        """Matrix FLOPs of one part's lists: num_queries with those that lead, num_new of them decided for."""
        raise NotImplementedError

    def prepare_flops(self, batch_size: int, num_new: int, num_keys: int) -> int:
        """Matrix FLOPs of `prepare` for num_new new tokens."""
        return 0

    def listed(self, num_keys: int) -> tuple[int, int, int]:
        """Slots, block size and heads of its lists."""
        raise NotImplementedError

    # --------------------------------------------------------------------------------- how it is used
    def attend(
        self, part: Part, k: Tensor, v: Tensor, prepared: Any, k_index: Tensor | None, k_doc_ids: Tensor | None,
        backend: str,
    ) -> Tensor:  # fmt: skip
        """Attention of a part's new queries."""
        with torch.no_grad():
            blocks = self.blocks(part, prepared)
        docs = {} if part.doc_ids is None else {"q_doc_ids": part.new(part.doc_ids), "k_doc_ids": k_doc_ids}
        index = part.new(part.index)
        return sparse_attention(
            part.new(part.q), k, v, blocks, scale=self.scale, q_index=index, k_index=k_index, **docs, backend=backend
        )[0]

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        k_index: Tensor | None = None,
        doc_ids: Tensor | None = None,
        state: SelectState | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """Attention o [B, T, Hq, D] of q to the keys k, v [B, S, Hkv, D] (all of the cache with a state, at order
        k_index [B, S]), each query to those that are selected for it."""
        B, T = q.shape[:2]
        lead = 0
        if state is None:
            index = torch.arange(T, device=q.device).expand(B, T)
        else:
            lead, length = self.memory, state.cache.length
            q = torch.cat([state.tail.to(q.dtype), q], 1)
            index = (length - T - lead)[:, None] + torch.arange(lead + T, device=q.device)
        place = index if doc_ids is None else positions_from(doc_ids, B, T, q.device)
        with torch.no_grad():
            prepared = self.prepare(Part(q, index, place, doc_ids, lead), k, state)
        outputs = []
        for start, first, stop in self._parts(B, lead, T, k.shape[1]):
            seen = slice(start, stop)
            ids = None if doc_ids is None else doc_ids[:, seen]
            part = Part(q[:, seen], index[:, seen], place[:, seen], ids, first - start)
            outputs.append(self.attend(part, k, v, prepared, k_index, doc_ids, backend))
        if state is not None:
            state.tail.copy_(handed_on(q[:, q.shape[1] - self.memory :]))
        return torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0]

    def _parts(self, batch_size: int, lead: int, num_queries: int, num_keys: int) -> Iterator[tuple[int, int, int]]:
        """Cuts of lead + num_queries queries: those that lead from `start`, the new ones in [first, stop)."""
        step = max(1, SCORES_AT_ONCE // max(batch_size * self.num_heads * num_keys, 1))
        for first in range(lead, lead + num_queries, step):
            yield max(0, first - self.memory), first, min(first + step, lead + num_queries)

    def block_table(
        self, whole: Part, k: Tensor, size: int, state: SelectState | None, summary: Callable[[Tensor], Tensor]
    ) -> tuple[KeyBlocks, Tensor]:
        """Blocks of `size` keys and the `summary` [B, N, ...] of the keys [B, N, size, Hkv, D] of each: of all blocks
        or, with a state, of those that the new tokens may have completed; its table holds the others."""
        if state is None:
            start = complete_blocks(whole.place, size, whole.doc_ids)
            return KeyBlocks(start, size, whole.doc_ids), summary(gather_blocks(k, start, size))
        S, new = k.shape[1], whole.new(whole.index)
        slots = new[:, :1] // size + torch.arange(-(-new.shape[1] // size), device=k.device)
        table = self.keep(state, summary(gather_blocks(k, slots * size, size)), slots, -(-S // size))
        return cached_blocks(k, size), table

    def keep(self, state: SelectState, new: Tensor, slots: Tensor, used: int) -> Tensor:
        """Write new [B, n, ...] into `slots` [B, n] of the table, and return its first `used` slots. A block that is
        not complete may be written too: it will be again."""
        missing = self.table_shape(state.cache.k.shape[1])[0] - state.table.shape[1]
        if missing > 0:
            state.table = F.pad(state.table, (0, 0) * (state.table.dim() - 2) + (0, missing))
        return write_slots(state.table, new, slots, used)

    def init_state(self, cache: KVCache) -> SelectState:
        """The state of an attention whose keys are in `cache`."""
        B, slots, like = cache.k.shape[0], cache.k.shape[1], cache.k
        tail = like.new_zeros(B, self.memory, self.num_heads, self.head_dim)
        return SelectState(cache, tail, like.new_zeros(B, *self.table_shape(slots), dtype=self.table_dtype))

    def state_bytes(self, max_len: int, itemsize: int) -> int:
        """Bytes of a row's state beside the cache, of numbers of `itemsize` bytes."""
        table = prod(self.table_shape(max_len)) * (self.table_dtype.itemsize if self.table_dtype else itemsize)
        return table + self.memory * self.num_heads * self.head_dim * itemsize

    def flops(self, batch_size: int, num_queries: int, num_keys: int, streaming: bool) -> int:
        """Matrix FLOPs of a call."""
        lead = self.memory if streaming else 0
        flops = self.prepare_flops(batch_size, num_queries, num_keys)
        for start, first, stop in self._parts(batch_size, lead, num_queries, num_keys):
            flops += self.scoring_flops(batch_size, stop - start, stop - first, num_keys)
            flops += self.attend_flops(batch_size, stop - first, num_keys)
        return flops

    def kept(self, seq_len: int) -> int:
        """Elements of a row kept for backward beside queries, keys, values, outputs and their denominators: lists."""
        slots, _, heads = self.listed(seq_len)
        return seq_len * slots * heads

    def attend_flops(self, batch_size: int, num_queries: int, num_keys: int) -> int:
        """Matrix FLOPs of attention to the lists of a part."""
        sizes = (self.num_heads, self.num_kv_heads, self.head_dim, self.head_dim)
        return attending.flops(batch_size, num_queries, num_keys, *sizes, *self.listed(num_keys))

    def scores(self, num_queries: int, context_len: int) -> int:
        """Scores that a row's softmax runs over, of all heads: of the own block and the listed ones before it."""
        slots, size, _ = self.listed(context_len + num_queries)
        return self.num_heads * work.block_pairs(num_queries, context_len, size, slots)

    def choosing_flops(self, num_queries: int, context_len: int) -> int:
        """Matrix FLOPs of the choice that the mathematics needs for a row: scores of what lies behind a query."""
        keys = context_len + num_queries
        said = self.prepare_flops(1, num_queries, keys) + self.scoring_flops(1, num_queries, num_queries, keys)
        return said * work.pairs(num_queries, context_len) // (num_queries * keys)

    def unread_keys(self, num_queries: int, context_len: int) -> int:
        """Keys of the context that no query reads; heads of a group differ where each has a list."""
        slots, size, heads = self.listed(context_len + num_queries)
        lists = self.num_heads // self.num_kv_heads if heads > self.num_kv_heads else 1
        return work.unread_keys(num_queries, context_len, slots * size * lists)
