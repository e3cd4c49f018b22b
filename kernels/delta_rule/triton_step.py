"""The gated delta rule in Triton for a few tokens: one after another, the state read and written once.

DECAY is 0 for none, 1 per head [B, T, H], 2 per channel [B, T, H, K]; R heads share q and k.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.kernels import gpu
from zoo.kernels.linear_attention.triton import fit, kind, shapes

TOKENS = [{"BV": 32, "num_warps": 4}]


@triton.jit(do_not_specialize=["scale"])
def delta_rule_tokens(
    q, k, v, beta, g, start, docs, o, final, scale, T, H: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr, DECAY: tl.constexpr, DOCS: tl.constexpr, START: tl.constexpr,
):  # fmt: skip
    """A tile of value channels of one head, its state in registers."""
    row, h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    d, e = tl.arange(0, KP), tl.program_id(0) * BV + tl.arange(0, BV)
    inside = (d < K)[:, None] & (e < V)[None, :]
    here = (row * H + h) * (K * V) + d[:, None] * V + e[None, :]
    S = tl.zeros((KP, BV), tl.float32)
    if START:
        S = tl.load(start + here, mask=inside, other=0.0)
    for t in range(0, T):
        token = row * T + t
        shared = (token * (H // R) + h // R) * K
        key = tl.load(k + shared + d, mask=d < K, other=0.0).to(tl.float32)
        query = tl.load(q + shared + d, mask=d < K, other=0.0).to(tl.float32)
        value = tl.load(v + (token * H + h) * V + e, mask=e < V, other=0.0).to(tl.float32)
        if DECAY == 1:
            S *= tl.exp(tl.load(g + token * H + h))
        if DECAY == 2:
            S *= tl.exp(tl.load(g + (token * H + h) * K + d, mask=d < K, other=0.0))[:, None]
        if DOCS:
            S = tl.where(tl.load(docs + token) == tl.load(docs + row * T + tl.maximum(t - 1, 0)), S, 0.0)
        write = tl.load(beta + token * H + h) * (value - tl.sum(S * key[:, None], 0))
        S += key[:, None] * write[None, :]
        out = tl.sum(S * query[:, None], 0) * scale
        tl.store(o + (token * H + h) * V + e, out.to(o.dtype.element_ty), mask=e < V)
    tl.store(final + here, S, mask=inside)


def padded(K: int) -> int:
    """Keys of K channels as a tile holds them."""
    return max(16, triton.next_power_of_2(K))


def forward(q, k, v, beta, log_decay, initial_state, docs, scale, o, final) -> None:
    """Fill o and final. Gates and states: float32; q, k, v, o of one dtype; all contiguous."""
    (B, T, H, V), s = v.shape, shapes(q, v)
    sizes = {name: s[name] for name in ("H", "R", "K", "V")}
    options = fit(gpu.options("delta_rule_tokens", q, TOKENS, K=s["K"], V=V), BV=V)
    with gpu.launching(q):
        delta_rule_tokens[triton.cdiv(V, options["BV"]), B * H](
            q, k, v, beta, log_decay, initial_state, docs, o, final, scale, T, KP=padded(s["K"]), DECAY=kind(log_decay),
            DOCS=docs is not None, START=initial_state is not None, **sizes, **options,
        )  # fmt: skip
