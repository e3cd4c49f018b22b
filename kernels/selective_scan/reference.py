"""Definition of the selective scan: a token loop."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.chunking import wide


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None,
    doc_ids: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """h_t = exp(delta_t A) * h_{t-1} + (delta_t u_t) B_t, y_t = h_t C_t; a document starts from h = 0."""
    dtype = wide(u.dtype)
    A = A.to(dtype)
    h = A.new_zeros(u.shape[0], *A.shape) if initial_state is None else initial_state.to(dtype)
    outputs = []
    for t, (u_t, d_t, b_t, c_t) in enumerate(zip(*(x.to(dtype).unbind(1) for x in (u, delta, B, C)))):
        if doc_ids is not None and t > 0:
            h = torch.where((doc_ids[:, t] == doc_ids[:, t - 1])[:, None, None], h, 0)
        h = torch.exp(d_t[..., None] * A) * h + (d_t * u_t)[..., None] * b_t[:, None]
        outputs.append((h * c_t[:, None]).sum(-1))
    return torch.stack(outputs, 1), h
