"""pLSTM in chunks: gates of neighbouring runs of tokens are merged in pairs, up to whole chunks.

A run of c tokens is summed up by W [cR, cV], what its tokens give each other; M [cR, J], how they read the state
before it; S [J, cV], how they write into the state after it; T [J, J], what becomes of the state. Two runs make one:
W = [[W', 0], [M'' S', W'']], M = [M'; M'' T'], S = [T'' S', S''], T = T'' T'. No transition is ever inverted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.chunking import Span, spans, wide


def plstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    source: Tensor,
    transition: Tensor,
    mark: Tensor,
    direct: Tensor,
    scale: float,
    initial_state: Tensor | None,
    doc_ids: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """See `zoo.kernels.plstm.plstm`."""
    dtype, out_dtype = wide(v.dtype), v.dtype
    q, k, v, source, transition, mark, direct = (x.to(dtype) for x in (q, k, v, source, transition, mark, direct))
    q = q * scale
    if doc_ids is not None:  # the first token of a document reads nothing and lets nothing through
        starts = torch.zeros_like(doc_ids, dtype=torch.bool)
        starts[:, 1:] = doc_ids[:, 1:] != doc_ids[:, :-1]
        starts = starts[..., None, None, None]
        transition, mark = transition.masked_fill(starts, 0), mark.masked_fill(starts, 0)
    (B, T, H, Dk), (J, Dv) = q.shape, (transition.shape[-1], v.shape[-1])
    C = v.new_zeros(B, H, J, Dk, Dv) if initial_state is None else initial_state.to(dtype)
    outputs = []
    for span in spans(T, chunk_size, binary=True):
        o, C = _chunks(span, q, k, v, source, transition, mark, direct, C)
        outputs.append(o)
    o = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
    return o.to(out_dtype), C


def _chunks(
    span: Span, q: Tensor, k: Tensor, v: Tensor, source: Tensor, transition: Tensor, mark: Tensor, direct: Tensor,
    C: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Outputs of one span [B, T, H, R, Dv] and the state after it."""

    def cut(x: Tensor) -> Tensor:
        """[B, N, H, chunk, ...]"""
        return span.take(x).unflatten(1, (-1, span.chunk)).transpose(2, 3)

    q, k, v, S, T, M, W = (cut(x) for x in (q, k, v, source, transition, mark, direct))
    (B, N, H, L, Dk), (V, Dv), (R, J) = q.shape, v.shape[4:], M.shape[4:]
    if span.pad:  # what is appended changes no state
        real = torch.arange(N * L, device=q.device).view(N, 1, L, 1, 1) < span.end - span.start
        T = torch.where(real, T, torch.eye(J, device=q.device, dtype=q.dtype))
    while T.shape[3] > 1:
        (T0, T1), (S0, S1), (M0, M1), (W0, W1) = (x.unflatten(3, (-1, 2)).unbind(4) for x in (T, S, M, W))
        early = torch.cat([W0, torch.zeros_like(W0)], -1)
        W = torch.cat([early, torch.cat([M1 @ S0, W1], -1)], -2)
        S, M, T = torch.cat([T1 @ S0, S1], -1), torch.cat([M0, M1 @ T0], -2), T1 @ T0
    T, S, M, W = (x.squeeze(3) for x in (T, S, M, W))  # [B, N, H, rows, columns]
    scores = q @ k.transpose(-1, -2)
    weights = (
        (W.unflatten(-1, (L, V)).unflatten(-3, (L, R)) * scores[..., :, None, :, None]).flatten(-2).flatten(-3, -2)
    )
    written = S.unflatten(-1, (L, V)).transpose(3, 4) @ v  # [B, N, H, L, J, Dv]
    update = k.transpose(-1, -2).unsqueeze(3) @ written.transpose(3, 4)  # [B, N, H, J, Dk, Dv]
    before, C = [], C.reshape(B, H, J, Dk * Dv)
    for keep, new in zip(T.unbind(1), update.flatten(-2).unbind(1)):
        before.append(C)
        C = keep @ C + new
    past = q.unsqueeze(3) @ torch.stack(before, 1).unflatten(-1, (Dk, Dv))  # [B, N, H, J, L, Dv]
    o = (weights @ v.flatten(3, 4)).unflatten(3, (L, R)) + M.unflatten(-2, (L, R)) @ past.transpose(3, 4)
    o = o.transpose(2, 3).flatten(1, 2)
    return o[:, : span.end - span.start], C.view(B, H, J, Dk, Dv)
