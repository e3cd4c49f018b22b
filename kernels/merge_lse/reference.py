"""Definition of the merge: two parts at a time, o + sigmoid(lse_b - lse_a) (o_b - o_a)."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_lse(outputs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """lse = lse_a + softplus(lse_b - lse_a); an empty part leaves the other as it is."""
    o, lse = torch.zeros_like(outputs[0]), torch.full_like(lses[0], -torch.inf)
    for o_b, lse_b in zip(outputs.unbind(), lses.unbind(), strict=True):
        only_b, only_a = lse == -torch.inf, lse_b == -torch.inf
        gap = torch.where(only_a | only_b, 0, lse_b) - torch.where(only_a | only_b, 0, lse)
        share = torch.where(only_a, 0, torch.where(only_b, 1, torch.sigmoid(gap)))
        both = torch.where(only_a | only_b, 0, lse) + torch.nn.functional.softplus(gap)
        o = o + share[..., None].to(o.dtype) * (o_b - o)
        lse = torch.where(only_a, lse, torch.where(only_b, lse_b, both))
    # both parts empty: the output stays what `share` = 0 left, zero
    return o, lse
