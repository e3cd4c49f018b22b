"""Initial values under which a mixer that takes over projections starts near the attention they come from. No block.

A block says so by itself: `like_attention` gives options, `from_attention` sets what it has and takes what it can of q,
k, v and o. Attention has no gate at its output, no convolution before its maps and no decay. So a gate starts open, a
convolution lets a token through as it is, a norm gives back the size of the values, and memories differ from head to
head. What is drawn where a block is built without attention is another thing: `reset_parameters`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.blocks.recurrent import ShortConv, wide

OPEN_SILU = 1.2784645427610738  # silu of it is 1
OPEN_GELU = 1.1447573  # tanh-gelu of it is 1
SMALL = 0.1  # what SiLU and GELU read is scaled by it: near 0 they are z / 2, and values pass as they are
MEMORIES = (1.0, 8.0)  # tokens, the shortest and the longest: most of what trained heads read is near


def memories(count: int, like: Tensor) -> Tensor:
    """Tokens after which a decay has forgotten all but 1 / e, [count] in fp32 (fp64), log-uniform over MEMORIES."""
    low, high = (math.log(m) for m in MEMORIES)
    return torch.linspace(low, high, count, device=like.device, dtype=wide(like).dtype).exp()


def inverse_softplus(y: Tensor) -> Tensor:
    """x with softplus(x) = y."""
    return y + torch.log(-torch.expm1(-y))


def decay_logit(log_decay: Tensor) -> Tensor:
    """x with logsigmoid(x) = log_decay < 0."""
    return log_decay - torch.log(-torch.expm1(log_decay))


def value_scale(v: Tensor, heads: int = 1) -> Tensor:
    """Root mean square that the rows of W_v give where x has one of 1: of every channel, or over `heads` together."""
    return wide(v).square().sum(1).unflatten(0, (heads, -1)).mean(0).sqrt()


def pass_through_(conv: ShortConv | nn.Conv1d, gain: float = 1.0) -> None:
    """A convolution that lets the token of now through, times `gain`."""
    conv.weight.zero_()[..., -1] = gain
    if conv.bias is not None:
        conv.bias.zero_()


def take(*maps: tuple[str, Tensor, Tensor]) -> tuple[str, ...]:
    """Copy (name, mine, theirs) where shapes are equal; names of what was taken."""
    taken = []
    for name, mine, theirs in maps:
        if mine.shape == theirs.shape:
            mine.copy_(theirs)
            taken.append(name)
    return tuple(dict.fromkeys(taken))


def low_rank(q: Tensor, k: Tensor, heads: int, rank: int) -> tuple[Tensor, Tensor]:
    """Rows [heads * rank, D] of queries and keys whose products q . k / sqrt(rank) are the nearest, in the mean over
    directions of x, to those of q and k [heads * d, D] divided by sqrt(d)."""
    q, k = (wide(t).unflatten(0, (heads, -1)) for t in (q, k))
    # singular vectors of Wq^T Wk [D, D] by way of its factors, which are much smaller
    (Qq, Rq), (Qk, Rk) = (torch.linalg.qr(t.mT) for t in (q, k))
    U, S, Vh = torch.linalg.svd(Rq @ Rk.mT)
    kept = min(rank, S.shape[-1])
    root = S[:, None, :kept].sqrt() * (rank / q.shape[1]) ** 0.25
    made = (Qq @ U[..., :kept] * root, Qk @ Vh.mT[..., :kept] * root)
    left, right = (F.pad(t, (0, rank - kept)).mT.flatten(0, 1) for t in made)
    return left, right
