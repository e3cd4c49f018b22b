"""Key-value caches: every token (KVCache), or the first `sinks` and the last `window` tokens (RingKVCache).

Both give the attention op what it needs to mask: the order index of each cached key in its row, -1 where a
slot is empty. Rows may be at different lengths (routers feed single rows, `reset(rows)` empties some), so the
lengths are a tensor and the host keeps only `size`, an upper bound over rows; it is made exact, at the price
of one synchronisation, only when a buffer would overflow or grow.

With gradients on, the tokens of the current segment carry their gradient and those already in the cache do
not: backpropagation is truncated at the segment border, but for `zoo.segments.differentiable_states`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from zoo.contract import State, counter
from zoo.segments import differentiable, handed_on

FIRST_CAPACITY = 64  # slots of a cache that grows


def kv_cache_bytes(batch_size: int, slots: int, num_heads: int, k_dim: int, v_dim: int, itemsize: int) -> int:
    """Bytes of a cache with `slots` slots a row: keys, values and the int64 lengths."""
    return batch_size * (slots * num_heads * (k_dim + v_dim) * itemsize + 8)


def ring_slots(max_len: int | None, window: int, sinks: int = 0) -> int:
    """Slots a ring cache holds per row."""
    return window + sinks if max_len is None else min(window + sinks, max_len)


@dataclass
class KVCache(State):
    """Keys and values of every token. k: [B, slots, H, Dk]; v: [B, slots, H, Dv]; length: [B] int64.

    With `block` > 1 (block diffusion) a token sees its whole block of that many tokens, the later ones as they
    were last written; so whoever sets it writes each block whole once, and may then `rewind` into it.
    """

    k: Tensor
    v: Tensor
    length: Tensor
    max_len: int | None = None
    size: int = counter()
    block: int = 1

    @classmethod
    def create(
        cls, batch_size: int, max_len: int | None, num_heads: int, k_dim: int, v_dim: int | None = None, *, like: Tensor
    ) -> KVCache:
        """An empty cache of `like`'s dtype and device; `max_len=None` grows by doubling."""
        slots = FIRST_CAPACITY if max_len is None else max_len
        return cls(*_buffers(batch_size, slots, num_heads, k_dim, v_dim, like), max_len=max_len)

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Write k [B, T, H, Dk], v [B, T, H, Dv] behind each row's tokens.

        Returns all keys and values [B, S, H, .], key_index [B, S] and query_index [B, T]: the order index of
        each key (-1: empty slot) and of the last token that each new one sees in its row, itself where block = 1.
        """
        self._reserve(k.shape[1])
        slots = segment_index(self.length, k.shape[1])
        used = self._whole(self.size)
        k_all, v_all = _write(self.k, k, slots, used), _write(self.v, v, slots, used)
        self.length.add_(k.shape[1])
        return k_all, v_all, self.key_index(), self._whole(slots + 1) - 1

    def key_index(self) -> Tensor:
        """Order index [B, S] of the token in each slot in use, -1 where empty."""
        slot = torch.arange(self._whole(self.size), device=self.length.device)
        return torch.where(slot < self._whole(self.length)[:, None], slot, -1)

    @property
    def in_order(self) -> bool:
        """Whether the next segment will see its own keys only, each token those up to itself."""
        return self.size == 0 and self.block == 1

    def mark(self) -> KVCache:
        return replace(self, length=self.length.clone())

    def untouched(self, before: KVCache) -> Tensor:
        return torch.arange(self.k.shape[1], device=self.length.device) < before.length[:, None]

    def rewind(self, length: int) -> None:
        """Go back to the first `length` tokens of every row; what was written behind them stays in its slots."""
        self.length.fill_(length)
        self.size = length

    def _whole(self, tokens: Any) -> Any:
        return tokens if self.block == 1 else -(-tokens // self.block) * self.block

    def _reserve(self, new: int) -> None:
        slots = self.k.shape[1]
        if self._whole(self.size + new) > slots:
            self.size = exact_size(self.length)
            check_max_len(self.size, new, self.max_len)
            while slots < self._whole(self.size + new):
                slots *= 2
            self.k, self.v = _grow(self.k, slots), _grow(self.v, slots)
        self.size += new


@dataclass
class RingKVCache(State):
    """Keys and values of the first `sinks` and the last `window` tokens; exact for segments of any length.

    k: [B, slots, H, Dk]; v: [B, slots, H, Dv]; length: [B] int64. Token j lies in slot j where j < sinks and
    in slot sinks + (j - sinks) mod window otherwise. Attention must mask by `window` and `sinks`: a slot may
    hold a token that has just left the window of a later query.
    """

    k: Tensor
    v: Tensor
    length: Tensor
    window: int
    sinks: int = 0
    max_len: int | None = None
    size: int = counter()

    @property
    def in_order(self) -> bool:
        """As `KVCache.in_order`."""
        return self.size == 0

    @classmethod
    def create(
        cls,
        batch_size: int,
        max_len: int | None,
        num_heads: int,
        k_dim: int,
        v_dim: int | None = None,
        *,
        window: int,
        sinks: int = 0,
        like: Tensor,
    ) -> RingKVCache:
        """An empty cache of `like`'s dtype and device; with a `max_len` below window + sinks it is smaller."""
        slots = ring_slots(max_len, window, sinks)
        return cls(*_buffers(batch_size, slots, num_heads, k_dim, v_dim, like), window, sinks, max_len)

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As `KVCache.append`. S = min(size, slots) for one token; past slots + T for a longer segment, whose
        first queries still need keys that its last tokens push out."""
        T = k.shape[1]
        if self.max_len is not None and self.size + T > self.max_len:
            self.size = exact_size(self.length)
            check_max_len(self.size, T, self.max_len)
        query_index = segment_index(self.length, T)
        past = min(self.size, self.k.shape[1])
        if T == 1:
            self.size += 1
            used, slots = min(self.size, self.k.shape[1]), self._slots(query_index)
            k_all, v_all = _write(self.k, k, slots, used), _write(self.v, v, slots, used)
            self.length.add_(1)
            return k_all, v_all, self.key_index(), query_index
        key_index = torch.cat([self.key_index(), query_index], 1)
        k_all = torch.cat([self.k[:, :past].to(k.dtype), k], 1)
        v_all = torch.cat([self.v[:, :past].to(v.dtype), v], 1)
        # the tokens that stay: sinks can only be among the first `sinks`, the others are the last `window`.
        # what the first write puts into the ring by mistake, the second overwrites
        cut = max(T - self.window, 0)
        for part in (slice(0, min(cut, self.sinks)), slice(cut, T)):
            slots = self._slots(query_index[:, part])
            _put(self.k, k[:, part], slots)
            _put(self.v, v[:, part], slots)
        self.length.add_(T)
        self.size += T
        return k_all, v_all, key_index, query_index

    def untouched(self, before: RingKVCache) -> Tensor:
        slots = self.k.shape[1]
        return self._tokens(slots) == before._tokens(slots)

    def key_index(self) -> Tensor:
        """Order index [B, min(size, slots)] of the token in each slot, -1 where empty."""
        return self._tokens(min(self.size, self.k.shape[1]))

    def _tokens(self, slots: int) -> Tensor:
        slot = torch.arange(slots, device=self.length.device)
        last = self.length[:, None] - 1
        recent = last - (last - slot) % self.window  # the newest token that belongs in this slot
        recent = torch.where(recent >= self.sinks, recent, -1)
        return torch.where(slot < self.sinks, torch.where(slot <= last, slot, -1), recent)

    def _slots(self, index: Tensor) -> Tensor:
        return torch.where(index < self.sinks, index, self.sinks + (index - self.sinks) % self.window)


def segment_index(length: Tensor, new: int) -> Tensor:
    """Order index [B, new] of the next `new` tokens of rows that hold `length` [B] tokens."""
    return length[:, None] + torch.arange(new, device=length.device)


def exact_size(length: Tensor) -> int:
    """The longest row (synchronises)."""
    return int(length.max()) if length.numel() else 0


def check_max_len(size: int, new: int, max_len: int | None) -> None:
    """Raise ValueError where `new` more tokens do not fit behind `size`."""
    if max_len is not None and size + new > max_len:
        raise ValueError(
            f"the state holds up to max_len={max_len} tokens a row: {size} are in it and {new} more were given; "
            "call init_state with a larger max_len, or with max_len=None to let it grow"
        )


def _buffers(
    batch_size: int, slots: int, num_heads: int, k_dim: int, v_dim: int | None, like: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        like.new_zeros(batch_size, slots, num_heads, k_dim),
        like.new_zeros(batch_size, slots, num_heads, k_dim if v_dim is None else v_dim),
        torch.zeros(batch_size, dtype=torch.int64, device=like.device),
    )


def _grow(buffer: Tensor, slots: int) -> Tensor:
    grown = buffer.new_zeros(buffer.shape[0], slots, *buffer.shape[2:])
    grown[:, : buffer.shape[1]] = buffer
    return grown


def _put(buffer: Tensor, x: Tensor, slots: Tensor) -> None:
    row = torch.arange(buffer.shape[0], device=buffer.device)[:, None]
    buffer.index_put_((row, slots), handed_on(x).to(buffer.dtype))


def _write(buffer: Tensor, x: Tensor, slots: Tensor, used: int) -> Tensor:
    """Put x into `slots` and return the first `used` slots, in grad mode as a copy: gradients
    reach x, and the buffer may change before backward. In `differentiable_states` each segment has its own."""
    _put(buffer, x, slots)
    if not torch.is_grad_enabled() or differentiable():
        return buffer[:, :used].to(x.dtype)
    row = torch.arange(buffer.shape[0], device=buffer.device)[:, None]
    return buffer[:, :used].to(x.dtype).index_put((row, slots), x)
