"""Block-Attention: passages that do not see one another, and a question behind them that sees them all.
Ma et al. 2024, arXiv:2409.15355.

    t in passage a: o_t = softmax over the tokens j <= t of passage a;   t behind them: over all j <= t
    joined keys:    k_j <- R(offset of its passage) k_j, since R(p + offset) = R(offset) R(p)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from zoo.blocks.attention import Attention
from zoo.blocks.kv_cache import KVCache, kv_cache_bytes, segment_index
from zoo.contract import ParallelPlan, State, linear_flops, positions_from, refuse_packed_streaming
from zoo.kernels import sparse_attention as attending
from zoo.kernels import work
from zoo.kernels.block_list import BlockList, sort_ids
from zoo.kernels.dispatch import check_backend
from zoo.kernels.rope import rope
from zoo.kernels.sparse_attention import sparse_attention
from zoo.registry import register
from zoo.schema import NonNegativeInt, PositiveFloat, PositiveInt


@dataclass
class BlockAttentionState(State):
    """The key-value cache; the place [B] from which tokens see everything, -1 for that of the block's options; and
    the base of the rotation of its keys, None without."""

    cache: KVCache
    question: Tensor = field(metadata={"fill": -1})
    rope_base: float | None = None


@register(
    "block_attention",
    kind="mixer",
    paper="arXiv:2409.15355",
    ops=("sparse_attention", "rope"),
    state_growth="linear",
    relations=(
        "block_attention(num_blocks=0) == attention()",
        "block_attention(num_blocks=1, block_size=24) == attention()",
    ),
    examples=(
        {"num_heads": 4, "num_kv_heads": 2, "block_size": 16, "num_blocks": 3},
        {"num_heads": 2, "block_size": 7, "num_blocks": 99},
        {"num_heads": 4, "block_size": 8, "num_blocks": 2, "rope": False, "qk_norm": "head"},
    ),
)
class BlockAttention(Attention):
    """Attention over passages that are read apart, and a question behind that sees all: their keys can be stored.

    The first num_blocks * block_size tokens of a document are passages of block_size tokens, which see themselves
    alone; tokens behind see all before them. Positions run through, as in training by the paper.
    What a passage becomes does not depend on the others, so states can be stored and reused: `one_passage(state)` makes
    a new state (of this block or of a model) read all of its row as one passage of any length; `join(states)` puts such
    states one behind the other, their keys rotated to where they now stand; what is then fed is the question.
    Joining equals reading the passages in one row, in every layer.
    x: [B, T, D] -> y: [B, T, D]. T block_size work in passages, T a token of the question. State: KV cache.
    One passage or none is attention. Parameters are those of `attention`.
    Useful: 4 H d FLOPs a pair inside a passage, and for each pair of the question.
    """

    shares_keys = False

    def __init__(
        self,
        dim: int,
        *,
        num_blocks: NonNegativeInt = 8,
        block_size: PositiveInt = 256,
        num_heads: PositiveInt | None = None,
        num_kv_heads: PositiveInt | None = None,
        head_dim: PositiveInt | None = None,
        rope: bool = True,
        rope_base: PositiveFloat = 10000.0,
        qk_norm: Literal["none", "head", "full"] = "none",
        kernel: str = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__(
            dim, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, rope=rope, rope_base=rope_base,
            qk_norm=qk_norm, device=device, dtype=dtype,
        )  # fmt: skip
        check_backend("sparse_attention", kernel)
        self.num_blocks, self.block_size, self.kernel = num_blocks, block_size, kernel
        self.rope_base = rope_base if rope else None

    def init_state(self, batch_size: int, max_len: int | None = None) -> BlockAttentionState:
        cache = super().init_state(batch_size, max_len)
        return BlockAttentionState(cache, torch.full_like(cache.length, -1), self.rope_base)

    def forward(
        self, x: Tensor, *, state: Any = None, positions: Tensor | None = None, doc_ids: Tensor | None = None
    ) -> Tensor:
        refuse_packed_streaming(state, doc_ids)
        B, T, _ = x.shape
        q, k, v, gate = self._project(x)
        place = positions_from(doc_ids, B, T, x.device) if state is None else segment_index(state.cache.length, T)
        q, k = (self._rotate(h, place if positions is None else positions) for h in (q, k))
        index = place if doc_ids is None else torch.arange(T, device=x.device).expand(B, T)
        k_index, question = index, place.new_full((B,), self.num_blocks * self.block_size)
        if state is not None:
            k, v, k_index, _ = state.cache.append(k, v)
            question = torch.where(state.question >= 0, state.question, question)
        blocks = self._lists(index, place, question, k.shape[1], doc_ids is not None)
        o, _ = sparse_attention(
            q, k, v, blocks, q_index=index, k_index=k_index, q_doc_ids=doc_ids, k_doc_ids=doc_ids, backend=self.kernel
        )  # fmt: skip
        return self._output(o, gate)

    def _lists(self, index: Tensor, place: Tensor, question: Tensor, num_keys: int, packed: bool) -> BlockList:
        """The own passage, or from `question` [B] on all that is before; documents start anywhere if `packed`."""
        size = self.block_size
        block = torch.arange(-(-num_keys // size), device=index.device)
        own, inside = (place // size)[..., None], (place < question[:, None])[..., None]
        seen = torch.where(inside, block == own, block <= own)
        ids = (index - place)[..., None] + block * size if packed else block
        idx = sort_ids(torch.where(seen, ids, -1))[:, None]
        return BlockList(idx, kv_block=size, stride=1 if packed else size)

    def parallel_plan(self) -> ParallelPlan:
        # its lists count places in the row
        return dataclasses.replace(super().parallel_plan(), context="gather_input")

    def forward_flops(self, batch_size: int, seq_len: int, context_len: int = 0, streaming: bool = False) -> int:
        B, T, Hq, Hkv, D, keys = batch_size, seq_len, self.num_heads, self.num_kv_heads, self.head_dim, context_len
        keys += T
        linear = linear_flops(B * T, self.q_proj, self.k_proj, self.v_proj, self.o_proj)
        slots = -(-keys // self.block_size)
        return linear + attending.flops(B, T, keys, Hq, Hkv, D, D, slots, self.block_size, 1)

    def scores(self, seq_len: int, context_len: int = 0) -> int:
        passages = self.num_blocks * self.block_size
        apart = max(0, min(seq_len, passages - context_len))  # tokens that see their own passage alone
        pairs = work.block_pairs(apart, context_len, self.block_size, 1)
        return self.num_heads * (pairs + work.pairs(seq_len - apart, context_len + apart))

    def state_bytes(self, batch_size: int, max_len: int) -> int:
        width = self.head_dim
        return kv_cache_bytes(batch_size, max_len, self.num_kv_heads, width, width, self.itemsize) + 8 * batch_size

    def activation_elements(self, batch_size: int, seq_len: int) -> int:
        lists = self.num_heads + -(-seq_len // self.block_size)
        return super().activation_elements(batch_size, seq_len) + batch_size * seq_len * lists


def _inside(states: Sequence[Any]) -> Any:
    """Names and values of the fields of states of one kind, as lists."""
    return ((f.name, [getattr(s, f.name) for s in states]) for f in dataclasses.fields(states[0]))


def one_passage(state: State) -> State:
    """Let a new state of block_attention, or of a model of such blocks, read its whole row as one passage."""
    if isinstance(state, BlockAttentionState):
        state.question.zero_()
    for _, (value,) in _inside([state]):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, State):
                one_passage(child)
    return state


def join(states: Sequence[Any]) -> Any:
    """One state from those of passages that were read apart, in this order; row b joins the rows b. States of
    block_attention and of models whose mixers are such blocks; ValueError for others."""
    if isinstance(states[0], BlockAttentionState):
        return _joined(states)
    values: dict[str, Any] = {}
    for name, parts in _inside(states):
        if isinstance(parts[0], list):
            values[name] = [join(children) for children in zip(*parts, strict=True)]
        elif isinstance(parts[0], State):
            values[name] = join(parts)
        elif isinstance(parts[0], Tensor) and name != "seen":  # `seen` counts the tokens of a model's state
            raise ValueError(f"{type(states[0]).__name__} depends on what came before it: only block_attention joins")
        else:
            values[name] = sum(parts) if isinstance(parts[0], Tensor) else parts[0]
    return type(states[0])(**values)


def _joined(states: Sequence[BlockAttentionState]) -> BlockAttentionState:
    caches, base = [s.cache for s in states], states[0].rope_base
    like, v, size = caches[0].k, caches[0].v, sum(c.size for c in caches)
    new = KVCache.create(len(like), max(size, 1), like.shape[2], like.shape[3], v.shape[3], like=like)
    new.max_len, new.size = None, size
    row = torch.arange(len(like), device=like.device)[:, None]
    for cache in caches:
        slots = segment_index(new.length, cache.size)
        k = cache.k[:, : cache.size]
        k = k if base is None else rope(k, new.length[:, None].expand(slots.shape), base=base)
        # what a shorter row holds behind its tokens is written over by the next passage, or lies behind the end
        new.k[row, slots], new.v[row, slots] = k, cache.v[:, : cache.size]
        new.length += cache.length
    return BlockAttentionState(new, new.length.clone(), base)
