"""Prefix tree: rows that begin alike hold that beginning once. ChunkAttention, Ye et al. 2024, arXiv:2402.15220.

page     = (the page before it, the keys and values of `chunk_size` tokens), the same one wherever both are equal
shared   : o_s, l_s = attention of all queries whose rows hold the pages s to them, together       (chunk first)
private  : o_p, l_p = attention of each query to the other pages of its row and to its open chunk  (sequence first)
o        = sum_n exp(l_n - l) o_n,   l = log sum_n exp(l_n)
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from zoo.blocks.cache_policy import CachePolicy
from zoo.blocks.kv_cache import check_max_len, kv_cache_bytes, segment_index
from zoo.contract import State, state_dtype
from zoo.kernels import sparse_attention as attending
from zoo.kernels.attention import attention, attention_flops
from zoo.kernels.block_list import BlockList
from zoo.kernels.merge_lse import merge_lse
from zoo.kernels.sparse_attention import sparse_attention
from zoo.registry import register
from zoo.schema import PositiveInt

WORTH_A_CALL = 128  # keys that need not be read again: fewer are read by each row for itself
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Page:
    """A full chunk, never written again. Rows, snapshots and copies hold it; when nobody does, its slot is free."""

    __slots__ = ("__weakref__", "pool", "slot")

    def __init__(self, pool: PagePool, slot: int):
        self.pool, self.slot = pool, slot

    def __del__(self):
        self.pool.free.append(self.slot)


class PagePool:
    """Pages k, v [slots, chunk, Hkv, D] of the rows of a state and of its copies, and the trie that they hang on.

    A page is found by the slot of the one before it and a checksum, and shared where every bit is equal. There is
    room for as many pages as were ever in use at once, and up to half as many ahead of need.
    """

    def __init__(self, k: Tensor, v: Tensor):
        self.k, self.v = k, v
        self.free: list[int] = []
        self.top = 0  # slots from here on were never in use
        self.known: WeakValueDictionary[tuple[int, int], Page] = WeakValueDictionary()

    def __len__(self) -> int:
        """Pages in use."""
        return self.top - len(self.free)

    def nbytes(self, pages: int = 0) -> int:
        """Bytes held, or of so many pages if that is more."""
        return max(pages, len(self.k)) * 2 * self.k.shape[1:].numel() * self.k.element_size()

    def extend(self, path: tuple[Page, ...], k: Tensor, v: Tensor, most: int) -> tuple[Page, ...]:
        """The pages of a row with those of k, v [n, chunk, Hkv, D] behind them: what is there already is shared.
        `most`: pages that rows may come to hold; up to them no more room than that is made."""
        checks, pages = _checksums(k, v), list(path)
        for check in checks:
            if (page := self.known.get((pages[-1].slot if pages else -1, check))) is None:
                break
            pages.append(page)
        if found := pages[len(path) :]:
            at, n = self.index([page.slot for page in found]), len(found)
            same = (_bits(self.k[at]) == _bits(k[:n])) & (_bits(self.v[at]) == _bits(v[:n]))
            del pages[len(path) + [*same.all(1).tolist(), False].index(False) :]
        n = len(pages) - len(path)
        slots = self._take(len(checks) - n, most)
        if slots:
            at = self.index(slots)
            self.k[at], self.v[at] = k[n:], v[n:]
        for check, slot in zip(checks[n:], slots, strict=True):
            page = Page(self, slot)
            self.known.setdefault((pages[-1].slot if pages else -1, check), page)
            pages.append(page)
        return tuple(pages)

    def _take(self, n: int, most: int) -> list[int]:
        if not len(self):
            self.free.clear()
            self.top = 0
        slots = [self.free.pop() for _ in range(min(n, len(self.free)))]
        fresh = n - len(slots)
        slots += range(self.top, self.top + fresh)
        self.top += fresh
        if self.top > len(self.k):
            ahead = len(self.k) * 3 // 2
            room = max(self.top, ahead if self.top > most else min(ahead, most))
            self.k, self.v = (torch.cat([x, x.new_zeros(room - len(x), *x.shape[1:])]) for x in (self.k, self.v))
        return slots

    def index(self, slots: Sequence[int]) -> Tensor:
        """The slots as a tensor."""
        return torch.tensor(slots, device=self.k.device)


def _bits(x: Tensor) -> Tensor:
    """x [n, ...] as integers [n, elements]."""
    return x.view(_INTEGERS[x.element_size()]).flatten(1)


def _checksums(k: Tensor, v: Tensor) -> list[int]:
    """A number for each of the pages k, v [n, chunk, Hkv, D]."""
    weight = torch.arange(1, 4 * k[0].numel(), 2, device=k.device)
    parts = zip(k.split(64), v.split(64), strict=True)  # in 64 bits they are large
    return torch.cat([(torch.cat([_bits(a), _bits(b)], 1).long() * weight).sum(1) for a, b in parts]).tolist()


class Row(NamedTuple):
    """What the host knows of a row: its pages, and how many tokens are in its open chunk."""

    pages: tuple[Page, ...] = ()
    open: int = 0


class Plan(NamedTuple):
    """How pages are read. shared: levels of disjoint groups (rows, slots of the pages they all hold); private: slots
    int32 [1, 1, B, n] of the other pages of each row, then -1, or None."""

    shared: list[list[tuple[Tensor, Tensor | slice]]]
    private: Tensor | None


def plan(paths: Sequence[tuple[Page, ...]], chunk_size: int, device: torch.device) -> Plan:
    """The plan of rows that hold these pages."""
    shared: list[list[tuple[list[int], list[int]]]] = []
    private: list[list[int]] = [[] for _ in paths]
    groups = [(list(range(len(paths))), 0, 0)]  # rows that agree on the pages up to `start`
    while groups:
        rows, start, level = groups.pop()
        first = paths[rows[0]]
        ends = range(start, min(len(paths[r]) for r in rows))
        # where the rows part; after that they do not meet again
        stop = start + bisect_left(ends, True, key=lambda i: any(paths[r][i] is not first[i] for r in rows))
        slots = [page.slot for page in first[start:stop]]
        if (len(rows) - 1) * len(slots) * chunk_size >= WORTH_A_CALL:
            if level == len(shared):
                shared.append([])
            shared[level].append((rows, slots))
            level += 1
        else:
            for r in rows:
                private[r] += slots
        parted = defaultdict(list)
        for r in rows:
            if stop < len(paths[r]):
                parted[paths[r][stop]].append(r)
        groups += [(part, stop, level) for part in parted.values()]

    def where(slots: list[int]) -> Tensor | slice:  # without a copy where they lie in a row
        run = slice(slots[0], slots[0] + len(slots))
        return run if slots == [*range(run.start, run.stop)] else torch.tensor(slots, device=device)

    width = max(len(slots) for slots in private)
    lists = [sorted(slots) + [-1] * (width - len(slots)) for slots in private]
    return Plan(
        [[(torch.tensor(rows, device=device), where(slots)) for rows, slots in level] for level in shared],
        torch.tensor(lists, dtype=torch.int32, device=device)[None, None] if width else None,
    )


@dataclass
class PrefixState(State):
    """Open chunks k, v [B, chunk, Hkv, D]; length: [B] int64; `held`: the pages of each row, which lie in the pool.

    Rows that move, repeat or are copied take their pages along by reference; a copy has the same pool. Rows that come
    from elsewhere (`put_rows`) share what is here already.
    """

    k: Tensor
    v: Tensor
    length: Tensor
    pool: PagePool
    held: list[Row]
    max_len: int | None = None
    plan: Plan | None = None  # of `held`, once it is wanted

    @property
    def nbytes(self) -> int:
        return super().nbytes + self.pool.nbytes()

    @property
    def max_nbytes(self) -> int:
        return super().max_nbytes + self.pool.nbytes(self._most)

    @property
    def _most(self) -> int:
        """Pages of full rows that share nothing; 0 where that has no bound."""
        return 0 if self.max_len is None else len(self.held) * (self.max_len // self.pool.k.shape[1])

    def append(self, k: Tensor, v: Tensor) -> None:
        """Write k, v [B, T, Hkv, D] behind each row's tokens; full chunks become pages."""
        T, chunk = k.shape[1], self.pool.k.shape[1]
        k, v = (x.detach().to(self.k.dtype) for x in (k, v))
        if all(row.open + T < chunk for row in self.held):
            index = (torch.arange(len(self.held), device=k.device)[:, None], segment_index(self.length % chunk, T))
            self.k.index_put_(index, k)
            self.v.index_put_(index, v)
            self.held = [Row(row.pages, row.open + T) for row in self.held]
        else:
            self.held = [self._grown(b, row, k[b], v[b]) for b, row in enumerate(self.held)]
            self.plan = None
        self.length.add_(T)

    def _grown(self, b: int, row: Row, k: Tensor, v: Tensor) -> Row:
        chunk = self.pool.k.shape[1]
        k, v = (torch.cat([old[b, : row.open], new]) for old, new in ((self.k, k), (self.v, v)))
        n, rest = divmod(len(k), chunk)
        self.k[b, :rest], self.v[b, :rest] = k[n * chunk :], v[n * chunk :]
        if not n:
            return Row(row.pages, rest)
        k, v = (x[: n * chunk].unflatten(0, (n, chunk)) for x in (k, v))
        return Row(self.pool.extend(row.pages, k, v, self._most), rest)

    # what an operation on tensors does to rows is learnt by doing it to their numbers
    def map(self, fn: Callable[[Tensor], Tensor]) -> Self:
        new = super().map(fn)
        number = fn(torch.arange(len(self.held), device=self.length.device))
        new.held, new.plan = [self.held[i] for i in number.tolist()], None
        return new

    def _copy_from(self, other: Self, fn: Callable, merge: Callable | None = None) -> None:
        pool, rows, count = self.pool, [*self.held, *other.held], len(self.held)
        number = torch.arange(len(rows), device=self.length.device)
        number = fn(number[:count], number[count:])
        super()._copy_from(other, fn, merge)
        self.pool, self.plan = pool, None
        self.held = [self._at_home(rows[i]) for i in number.tolist()]

    def _at_home(self, row: Row) -> Row:
        if not row.pages or row.pages[0].pool is self.pool:
            return row
        pool, at = row.pages[0].pool, self.pool.index([page.slot for page in row.pages])
        return Row(self.pool.extend((), pool.k[at], pool.v[at], self._most), row.open)

    def reset(self, rows: Tensor | None = None) -> None:
        super().reset(rows)
        for b in range(len(self.held)) if rows is None else rows.tolist():
            self.held[b] = Row()
        self.plan = None

    def __deepcopy__(self, memo: dict) -> Self:
        return self.clone()


@register(
    "prefix_tree",
    kind="cache",
    paper="arXiv:2402.15220",
    ops=("attention", "sparse_attention", "merge_lse"),
    state_growth="linear",
    relations=("attention(cache='prefix_tree') == attention()",),
    examples=({"chunk_size": 16}, {"chunk_size": 5}),
)
class PrefixTree(CachePolicy):
    """Attention itself; rows of a batch that begin with the same tokens hold those keys and values once.

    Full chunks of `chunk_size` tokens are pages of a pool that no row owns. Rows share a page where they share the one
    before it and its keys and values are equal bit for bit, so that nothing but bytes and the order of sums depends on
    it. Rows that are read together and begin alike find each other, as far as the processor gave them equal bits;
    `generate` reads what all prompts have in common once, in one row, and `reorder` repeats that row for nothing, as
    in beam search. A page that no row and no snapshot holds makes room for others.
    Queries of all rows that hold the same pages attend to them together, then each row to the rest of its own: faster
    than the plain cache where much is shared, and slower where nothing is.
    State: 2 Hkv D a token, in whole chunks, once for rows that share it. It grows with use; `state_bytes` and
    predicted costs are those of rows that share nothing. A row that ends a chunk waits for the device.
    Useful: 4 H d FLOPs a causal pair, shared or not.
    """

    cuts_gradient = "pages are shared by rows and hold no gradient"

    expectation = "prefix_tree: rows share nothing"

    def __init__(self, *, chunk_size: PositiveInt = 32):
        self.chunk_size = chunk_size

    def init_state(self, batch_size: int, max_len: int | None, like: Tensor) -> PrefixState:
        chunk, heads = self.chunk_size, (self.num_kv_heads, self.head_dim)
        slots = chunk if max_len is None else min(chunk, max_len)
        return PrefixState(
            k=like.new_zeros(batch_size, slots, *heads),
            v=like.new_zeros(batch_size, slots, *heads),
            length=torch.zeros(batch_size, dtype=torch.int64, device=like.device),
            pool=PagePool(like.new_zeros(0, chunk, *heads), like.new_zeros(0, chunk, *heads)),
            held=[Row()] * batch_size,
            max_len=max_len,
        )

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: Tensor,
        *,
        rotate: Callable[[Tensor, Tensor], Tensor],
        doc_ids: Tensor | None = None,
        state: State | None = None,
        backend: str = "auto",
    ) -> Tensor:
        q, k = rotate(q, positions), rotate(k, positions)
        if isinstance(state, PrefixState):
            return self._streamed(q, k, v, state, backend)  # type: ignore[call-arg]  # the decorator loses the signature
        docs: Any = {"q_doc_ids": doc_ids, "k_doc_ids": doc_ids}
        return attention(q, k, v, scale=self.scale, **docs, backend=backend)[0]

    @torch.compiler.disable
    def _streamed(self, q: Tensor, k: Tensor, v: Tensor, state: PrefixState, backend: str) -> Tensor:
        T, rows = q.shape[1], state.held
        used = max((row.open for row in rows), default=0)
        check_max_len(max((len(r.pages) * self.chunk_size + r.open for r in rows), default=0), T, state.max_len)
        parts, keys, values, q_index, k_index = list(self._past(q, state, backend)), k, v, None, None
        if parts or used:
            length, slot = state.length % self.chunk_size, torch.arange(used, device=q.device)
            q_index = segment_index(length, T)
            k_index = torch.cat([torch.where(slot < length[:, None], slot, -1), q_index], 1)
            keys, values = (torch.cat([old[:, :used].to(x.dtype), x], 1) for old, x in ((state.k, k), (state.v, v)))
        o, lse = attention(
            q, keys, values, scale=self.scale, q_index=q_index, k_index=k_index, need_lse=bool(parts), backend=backend
        )
        state.append(k, v)
        if lse is None:
            return o
        parts.append((o, lse))
        return merge_lse([o for o, _ in parts], [lse for _, lse in parts])[0]

    def _past(self, q: Tensor, state: PrefixState, backend: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Attention to pages: of all queries whose rows share some together, then of each row to its others."""
        (B, T, Hq), pool = q.shape[:3], state.pool
        if not any(row.pages for row in state.held):
            return
        state.plan = state.plan or plan([row.pages for row in state.held], self.chunk_size, q.device)
        k, v = (x[: pool.top].to(q.dtype) for x in (pool.k, pool.v))
        if q.requires_grad:  # the pool is written before backward reads it
            k, v = k.clone(), v.clone()
        for level in state.plan.shared:
            o, lse = torch.zeros_like(q), q.new_full((B, T, Hq), -torch.inf, dtype=state_dtype(q.dtype))
            for rows, slots in level:
                keys, values = (x[slots].flatten(0, 1)[None] for x in (k, v))
                some = q[rows].flatten(0, 1)[None]
                got: Any = attention(some, keys, values, causal=False, scale=self.scale, need_lse=True, backend=backend)
                o, lse = (x.index_copy(0, rows, y.view(-1, *x.shape[1:])) for x, y in zip((o, lse), got))
            yield o, lse
        if state.plan.private is not None:
            blocks = BlockList(state.plan.private, q_tile=T, kv_block=self.chunk_size)
            q, k, v = (x.flatten(0, 1)[None] for x in (q, k, v))
            o, lse = sparse_attention(q, k, v, blocks, causal=False, scale=self.scale)
            yield o.view(B, T, Hq, -1), lse.view(B, T, Hq)

    def flops(self, batch_size: int, seq_len: int, context_len: int, streaming: bool) -> int:
        B, T, H, D = batch_size, seq_len, self.num_heads, self.head_dim
        pages, left = divmod(context_len, self.chunk_size)
        own = attention_flops(B, T, left + T, H, D, plain=not context_len, fused=not pages)
        if not pages:
            return own
        keys, block = B * pages * self.chunk_size, self.chunk_size
        return own + attending.flops(1, B * T, keys, H, self.num_kv_heads, D, D, pages, block, 1, q_tile=T)

    def state_bytes(self, max_len: int, itemsize: int) -> int:
        slots = max_len // self.chunk_size * self.chunk_size + min(self.chunk_size, max_len)
        return kv_cache_bytes(1, slots, self.num_kv_heads, self.head_dim, self.head_dim, itemsize)

    def kept(self, seq_len: int, rotary_dim: int) -> int:
        # q, o and its denominators, k, v, cos and sin for q and for k
        width = self.num_heads * (2 * self.head_dim + 1) + 2 * self.num_kv_heads * self.head_dim
        return seq_len * (width + 2 * rotary_dim)
