"""pLSTM with one slot, one value and one output a token, by linear attention and all its rows.

The sign of the product of transitions is kept apart, C = sign * C', and C' has the decay |T|. A token reads what is
there after the one before it, so queries are shifted by one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.kernels.chunking import wide
from zoo.kernels.linear_attention import linear_attention


def refuse(
    q: Tensor, k: Tensor, v: Tensor, source: Tensor, transition: Tensor, mark: Tensor, direct: Tensor, scale: float,
    initial_state: Tensor | None, doc_ids: Tensor | None, chunk_size: int,
) -> str | None:  # fmt: skip
    """Why this row cannot do the call, or None."""
    return None if direct.shape[3:] == transition.shape[3:] == (1, 1) else "only one slot, value and output a token"


def plstm(
    q: Tensor, k: Tensor, v: Tensor, source: Tensor, transition: Tensor, mark: Tensor, direct: Tensor, scale: float,
    initial_state: Tensor | None, doc_ids: Tensor | None, chunk_size: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `zoo.kernels.plstm.plstm`."""
    dtype, out_dtype = wide(v.dtype), v.dtype
    v, source, transition, mark, direct = (x.to(dtype).squeeze(-2) for x in (v, source, transition, mark, direct))
    sign = torch.where(transition < 0, -1.0, 1.0).to(dtype).cumprod(1)  # [B, T, H, 1]
    # the bound keeps the logarithm and its gradient finite: a transition this close to 0 is not told from it
    log_decay = transition.abs().clamp(min=torch.finfo(dtype).eps).log().squeeze(-1)
    past, memory = linear_attention(
        F.pad(q[:, 1:], (0, 0, 0, 0, 0, 1)),
        k,
        v * (sign * source),
        log_decay,
        scale=scale,
        initial_state=None if initial_state is None else initial_state.squeeze(2),
        doc_ids=doc_ids,
    )
    first = torch.zeros_like(v[:, :1])
    if initial_state is not None:
        first = (q[:, :1].to(dtype).transpose(1, 2) @ initial_state.squeeze(2).to(dtype)).transpose(1, 2) * scale
    past = torch.cat([first, (past * sign)[:, :-1]], 1)
    if doc_ids is not None:
        starts = F.pad(doc_ids[:, 1:] != doc_ids[:, :-1], (1, 0))
        past = past.masked_fill(starts[..., None, None], 0)
    here = scale * (q.to(dtype) * k.to(dtype)).sum(-1, keepdim=True)
    o = mark * past + direct * here * v
    return o.unsqueeze(-2).to(out_dtype), (memory * sign[:, -1, :, None]).unsqueeze(2)
