"""H2O: a cache that forgets, head by head, the keys that were attended to least. Zhang et al. 2023, arXiv:2306.14048.

a_j  = sum of the attention weights that j has received, over the query heads of its group
kept = the last `recent` tokens and the `heavy` others with the largest a_j, chosen after every `interval` tokens
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from zoo.blocks.cache_policy import CachePolicy
from zoo.blocks.kv_cache import segment_index
from zoo.contract import State, positions_from, state_dtype
from zoo.kernels import work
from zoo.kernels.precision import no_autocast
from zoo.registry import register
from zoo.schema import NonNegativeInt, PositiveInt
from zoo.segments import handed_on


@dataclass
class H2OState(State):
    """Of every head: keys and values k, v [B, slots, Hkv, D], the attention each has received [B, slots, Hkv] and its
    order index [B, slots, Hkv], ascending, then -1; length: [B] int64."""

    k: Tensor
    v: Tensor
    score: Tensor
    index: Tensor = field(metadata={"fill": -1})
    length: Tensor


@register(
    "h2o",
    kind="cache",
    paper="arXiv:2306.14048",
    state_growth="constant",
    relations=(
        "attention(cache={'h2o': {'recent': 4096}}) == attention()",
        "attention(cache={'h2o': {'heavy': 4096, 'recent': 1, 'interval': 5}}) == attention()",
        "attention(cache={'h2o': {'heavy': 0, 'recent': 8, 'interval': 1}}) == attention(window=9)",
    ),
    examples=({"heavy": 4, "recent": 6, "interval": 20},),
)
class HeavyHitters(CachePolicy):
    """Each key head holds the last `recent` tokens and the `heavy` others that attention has liked most so far.

    Weights are summed over the query heads of a group and over all queries that saw the key; ties go to the earliest.
    The paper forgets after every token, interval=1; a longer interval holds as many more tokens and takes as many
    fewer steps, for the tokens between two choices are done together. Positions stay the true ones. The choice has no
    gradient. State: heavy + recent + interval tokens. heavy or recent of T is attention; heavy=0 with interval=1 is a
    window of recent + 1.
    Useful: 4 H d FLOPs for each token that is held, between two choices half an interval more than heavy + recent.
    """

    def __init__(self, *, heavy: NonNegativeInt = 128, recent: PositiveInt = 128, interval: PositiveInt = 16):
        self.heavy, self.recent, self.interval = heavy, recent, interval

    @property
    def _slots(self) -> int:
        return self.heavy + self.recent + self.interval

    def init_state(self, batch_size: int, max_len: int | None, like: Tensor) -> H2OState:
        return self._empty((batch_size, self._slots, self.num_kv_heads), like)

    def _empty(self, shape: tuple[int, int, int], like: Tensor) -> H2OState:
        return H2OState(
            k=like.new_zeros(*shape, self.head_dim),
            v=like.new_zeros(*shape, self.head_dim),
            score=like.new_zeros(shape, dtype=state_dtype(like.dtype)),
            index=torch.full(shape, -1, dtype=torch.int64, device=like.device),
            length=torch.zeros(shape[0], dtype=torch.int64, device=like.device),
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
        B, T = q.shape[:2]
        held = state if isinstance(state, H2OState) else self._empty((B, min(T, self._slots), k.shape[2]), k)
        index = segment_index(held.length, T)
        place = index if doc_ids is None else positions_from(doc_ids, B, T, q.device)
        now = (held.k.to(k.dtype), held.v.to(v.dtype), held.score, held.index)
        outputs, slots = [], held.k.shape[1]
        for part in (slice(a, a + self.interval) for a in range(0, T, self.interval)):
            rows = rotate(q[:, part], positions[:, part]), rotate(k[:, part], positions[:, part]), v[:, part]
            o, now = self._step(*rows, index[:, part], place[:, part], now, slots, doc_ids)
            outputs.append(o)
        if state is held:
            for old, new in zip((held.k, held.v, held.score, held.index), now, strict=True):
                old.copy_(handed_on(new))
            held.length.add_(T)
        return torch.cat(outputs, 1)

    def _step(
        self, q: Tensor, k: Tensor, v: Tensor, index: Tensor, place: Tensor, held: tuple[Tensor, ...], slots: int,
        doc_ids: Tensor | None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
        """At most `interval` tokens, so that at most one of them is the last before a choice."""
        (B, L, Hq, D), H, wide = q.shape, k.shape[2], state_dtype(q.dtype)
        keys, values = torch.cat([held[0], k], 1), torch.cat([held[1], v], 1)
        order = torch.cat([held[3], index[..., None].expand(-1, -1, H)], 1).transpose(1, 2)  # [B, H, N]
        score = torch.cat([held[2], held[2].new_zeros(B, L, H)], 1).transpose(1, 2)
        seen = (order >= 0)[:, :, None] & (order[:, :, None] <= index[:, None, :, None])  # [B, H, L, N]
        if doc_ids is not None:
            ids = doc_ids[torch.arange(B, device=q.device)[:, None, None], order.clamp(min=0)]
            same = ids[:, :, None] == doc_ids.gather(1, index)[:, None, :, None]
            seen = seen & same
        with no_autocast(q.device):
            rows = q.to(wide).transpose(1, 2).unflatten(1, (H, -1)).flatten(2, 3)
            logits = (rows @ keys.to(wide).permute(0, 2, 3, 1)).view(B, H, -1, L, order.shape[-1]) * self.scale
        p = self._softmax(logits, seen)
        # the choice after the token where (place + 1) is a multiple of the interval; tokens behind it see its outcome
        ends = (place + 1) % self.interval == 0
        last = torch.where(ends.any(1), torch.where(ends, index, 0).amax(1), -1)[:, None, None]
        late = index[:, None, :, None] > torch.where(last >= 0, last, index[:, -1:, None])[..., None]
        received = score + p.detach().sum(2).masked_fill(late, 0).sum(2)
        old = (order >= 0) & (order <= last - self.recent)
        if doc_ids is not None:
            old = old & (ids == doc_ids.gather(1, last[:, 0].clamp(min=0))[..., None])
        rank = received.masked_fill(~old, float("-inf")).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        alive = (order >= 0) & (~old | (rank < self.heavy))
        p = torch.where(late[:, :, None], self._softmax(logits, seen & alive[:, :, None]), p)
        received = received + p.detach().sum(2).masked_fill(~late, 0).sum(2)
        with no_autocast(q.device):
            o = p.flatten(2, 3) @ values.to(wide).transpose(1, 2)
        o = o.view(B, Hq, L, D).transpose(1, 2).to(q.dtype)
        if doc_ids is not None:
            alive = alive & same[:, :, -1]
        stay = torch.where(alive, order, torch.iinfo(order.dtype).max).argsort(dim=-1, stable=True)[..., :slots]
        token = stay.transpose(1, 2)
        order = torch.where(alive, order, -1).gather(-1, stay).transpose(1, 2)
        keys, values = (x.gather(1, token[..., None].expand(-1, -1, -1, D)) for x in (keys, values))
        return o, (keys, values, received.gather(-1, stay).transpose(1, 2), order)

    def _softmax(self, logits: Tensor, seen: Tensor) -> Tensor:
        """Over [B, H, G, L, N] where `seen` [B, H, L, N]; a token sees itself, so no row is empty."""
        return logits.masked_fill(~seen[:, :, None], float("-inf")).softmax(-1)

    def flops(self, batch_size: int, seq_len: int, context_len: int, streaming: bool) -> int:
        slots, pairs = self._slots if streaming else min(seq_len, self._slots), 0
        for start in range(0, seq_len, self.interval):
            tokens = min(self.interval, seq_len - start)
            pairs += tokens * (slots + tokens)
        return 4 * batch_size * self.num_heads * pairs * self.head_dim

    def scores(self, seq_len: int, context_len: int) -> int:
        held = self.heavy + self.recent + (self.interval + 1) // 2  # between two choices, on average
        return self.num_heads * work.pairs(seq_len, context_len, held)

    def state_bytes(self, max_len: int, itemsize: int) -> int:
        return self._slots * self.num_kv_heads * (2 * self.head_dim * itemsize + max(itemsize, 4) + 8) + 8

    def kept(self, seq_len: int, rotary_dim: int) -> int:
        # o, q, cos and sin for q and for k; a step: k and v of the cache as products read them, both softmaxes, what is
        # taken of them, masks; and, but for the last, k and v with the order in which they stay
        H, G, D, slots = self.num_heads, self.num_kv_heads, self.head_dim, min(seq_len, self._slots)
        kept = seq_len * (2 * H * D + 2 * rotary_dim)
        for start in range(0, seq_len, self.interval):
            tokens = min(self.interval, seq_len - start)
            keys = slots + tokens
            kept += 2 * keys * G * D + tokens * keys * (3 * H + G // 2)
            if start + tokens < seq_len:
                kept += keys * G * (2 * D + 2)
        return kept
