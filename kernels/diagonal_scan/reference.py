"""Definition of the diagonal scan: a token loop."""

from __future__ import annotations

import torch
from torch import Tensor


def diagonal_scan(
    log_decay: Tensor, inputs: Tensor, initial_state: Tensor | None, doc_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """h_t = exp(log_decay_t) * h_{t-1} + inputs_t; a document starts from h = 0."""
    wide = torch.promote_types(torch.promote_types(log_decay.dtype, inputs.dtype), torch.float32)
    out = torch.promote_types(inputs.dtype, wide) if wide.is_complex else inputs.dtype
    decay = torch.exp(log_decay.to(wide).expand_as(inputs)).unbind(1)
    h = torch.zeros_like(inputs[:, 0], dtype=wide) if initial_state is None else initial_state.to(wide)
    states = []
    for t, x in enumerate(inputs.to(wide).unbind(1)):
        if doc_ids is not None and t > 0:
            same = doc_ids[:, t] == doc_ids[:, t - 1]
            h = torch.where(same.view(-1, *[1] * (h.ndim - 1)), h, 0)
        h = decay[t] * h + x
        states.append(h)
    return torch.stack(states, 1).to(out), h
