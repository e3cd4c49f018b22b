"""All parts of the merge at once."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_lse(outputs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """See `zoo.kernels.merge_lse.merge_lse`; outputs: [n, B, T, H, Dv], lses: [n, B, T, H]."""
    top = lses.detach().amax(0)
    top = top.masked_fill(top == -torch.inf, 0)
    weights = torch.exp(lses - top)
    total = weights.sum(0)
    empty = total == 0
    total = total.masked_fill(empty, 1)
    share = (weights / total)[..., None]
    # an empty part may carry anything, so its output is not multiplied but left out
    kept = outputs.to(share.dtype).masked_fill((lses == -torch.inf)[..., None], 0)
    o = (share * kept).sum(0).to(outputs.dtype)
    return o, (top + torch.log(total)).masked_fill(empty, -torch.inf)
