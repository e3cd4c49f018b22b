"""Pieces that the chunked recurrences share: cutting into chunks, document masks, decayed pair matrices, carry."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

DIAGONAL = 4  # tokens of a diagonal block whose decays are formed one by one


class Documents(NamedTuple):
    """Which pairs and which carried states stay inside one document, for N chunks of C tokens."""

    pair: Tensor  # [B, N, C, C] query and key are in one document
    query: Tensor  # [B, N, C] the token continues the document that the previous chunk ended with
    key: Tensor  # [B, N, C] the token's document is alive at the end of its chunk
    keep: Tensor  # [B, N] the whole chunk is one document with the end of the previous chunk


class Span(NamedTuple):
    """Tokens start..end of a row, cut into chunks of `chunk` tokens after `pad` neutral ones are appended."""

    start: int
    end: int
    chunk: int
    pad: int

    def take(self, x: Tensor) -> Tensor:
        """Its tokens of x [B, T, ...], zeros appended."""
        x = x if self.start == 0 and self.end == x.shape[1] else x[:, self.start : self.end]
        return F.pad(x, (0, 0) * (x.ndim - 2) + (0, self.pad)) if self.pad else x

    def documents(self, doc_ids: Tensor) -> Documents:
        """Masks for its chunks, the document in front of them being that of the token before `start`."""
        ids = doc_ids[:, self.start : self.end]
        if self.pad:
            ids = torch.cat([ids, ids[:, -1:].expand(-1, self.pad)], 1)
        ids = ids.unflatten(1, (-1, self.chunk))
        end, before = ids[..., -1], doc_ids[:, max(self.start - 1, 0)]
        start = torch.cat([before[:, None], end[:, :-1]], 1)
        return Documents(
            ids[..., :, None] == ids[..., None, :], ids == start[..., None], ids == end[..., None], end == start
        )


def spans(seq_len: int, chunk: int, binary: bool) -> list[Span]:
    """Whole chunks, then what is left as one shorter chunk, so that almost nothing is padded. `binary`: chunk
    lengths are powers of two (the last one padded up to that)."""
    if binary:
        chunk = 1 << (chunk.bit_length() - 1)
    whole = seq_len - seq_len % chunk
    rest = seq_len - whole
    last = 1 << (rest - 1).bit_length() if binary and rest else rest
    cut = (Span(0, whole, chunk, 0), Span(whole, seq_len, last, last - rest))
    return [s for s in cut if s.start < s.end]


def wide(dtype: torch.dtype) -> torch.dtype:
    """Dtype in which recurrences are computed: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def causal(chunk: int, device: torch.device) -> Tensor:
    """[C, C], true where the key is not after the query."""
    return torch.ones(chunk, chunk, dtype=torch.bool, device=device).tril()


def scalar_decays(total: Tensor, allowed: Tensor) -> Tensor:
    """exp(b_i - b_j) where allowed, else 0. total: b [..., C], cumulative log-decays; allowed: [..., C, C].
    Masked before exp, so that neither the value nor the gradient ever sees an overflow."""
    return (total[..., :, None] - total[..., None, :]).masked_fill(~allowed, float("-inf")).exp()


def vector_decayed_scores(rows: tuple[Tensor, ...], k: Tensor, total: Tensor) -> list[Tensor]:
    """A_ij = sum_d row_id k_jd exp(b_id - b_jd) for i >= j, else 0, for each [..., C, D] of `rows`.

    total: b [..., C, D]; C a power of two. Every exponent is <= 0: pairs of neighbouring blocks of 4, 8, 16 ..
    tokens are one product with the decay measured from the border between them (one exp for a token, a channel
    and a level), and only inside the smallest blocks is each pair's decay formed.
    """
    C = k.shape[-2]
    size = min(DIAGONAL, C)
    b, keys = total.unflatten(-2, (-1, size)), k.unflatten(-2, (-1, size))
    gap = b[..., :, None, :] - b[..., None, :, :]
    decay = gap.masked_fill(~causal(size, k.device)[..., None], float("-inf")).exp() * keys[..., None, :, :]
    out = [(r.unflatten(-2, (-1, size))[..., None, :] * decay).sum(-1) for r in rows]
    while size < C:
        early, late = total.unflatten(-2, (-1, 2, size)).unbind(-3)
        border = early[..., -1:, :]
        right = (k.unflatten(-2, (-1, 2, size)).select(-3, 0) * (border - early).exp()).transpose(-1, -2)
        left_decay = (late - border).exp()
        for n, row in enumerate(rows):
            cross = (row.unflatten(-2, (-1, 2, size)).select(-3, 1) * left_decay) @ right
            first, second = out[n].unflatten(-3, (-1, 2)).unbind(-3)
            upper = torch.cat([first, torch.zeros_like(first)], -1)
            out[n] = torch.cat([upper, torch.cat([cross, second], -1)], -2)
        size *= 2
    return [a.squeeze(-3) for a in out]


def vector_score_flops(chunk: int, dim: int) -> int:
    """Matrix FLOPs of `vector_decayed_scores` for one chunk, head and row tensor."""
    return chunk * dim * max(chunk - DIAGONAL, 0)


def carry(update: Tensor, decay: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """S_{n+1} = decay_n * S_n + update_n. update, decay: [B, N, ...]; returns all S_n before their chunk
    [B, N, ...] and the last state."""
    before = []
    steps = update.unbind(1)
    decays = [None] * len(steps) if decay is None else decay.unbind(1)
    for u, d in zip(steps, decays):
        before.append(state)
        state = state + u if d is None else torch.addcmul(u, state, d)
    return torch.stack(before, 1), state


def check_heads(op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError where the shapes of q, k and v do not fit together."""
    if q.shape != k.shape or q.shape[:2] != v.shape[:2] or v.shape[2] % k.shape[2]:
        raise ValueError(
            f"{op}: q and k must be [B, T, Hq, Dk] and v [B, T, H, Dv] with Hq dividing H, got "
            f"{list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
