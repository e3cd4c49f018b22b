"""The selective scan in Triton. A program owns a tile of channels of one row and walks over time with its states
h [BE, NP] in registers, storing them before every 16 tokens where backward will follow (triton_backward.py).

Where rows and channels are too few for the GPU, time is cut into chunks: `selective_scan_ends` computes what each
chunk adds to the state and how far it decays, exp(A sum delta), `selective_scan_pass` walks over the chunks, and then
all chunks run at once from the right states. Nothing of size [B, T, E, N] exists.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels import gpu
from zoo.kernels.chunking import wide
from zoo.kernels.selective_scan import fused, triton_backward
from zoo.kernels.selective_scan.triton_tiles import begins, chunk_starts, padded, parts, step_decay, tile, token

INTERVAL = 16
FORWARD = [{"BE": 32, "num_warps": 1}, {"BE": 16, "num_warps": 1}]


@triton.jit
def selective_scan_forward(
    u, delta, A, Bt, Ct, start, docs, y, last, states, T, span, E, N, EP,
    NP: tl.constexpr, BE: tl.constexpr, INTERVAL: tl.constexpr, GROUP: tl.constexpr, START: tl.constexpr,
    DOCS: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """A tile of channels, `span` tokens of a row. start [B, chunks, E, N]."""
    chunk, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    e, n, channel, slot, inside, here = tile(E, N, BE, NP)
    decay = step_decay(A, here, inside)
    h = tl.zeros((BE, NP), tl.float32)
    if START:
        h = tl.load(start + (row * tl.num_programs(1) + chunk) * E * N + here, mask=inside, other=0.0)
    count = tl.cdiv(T, INTERVAL)
    end = tl.minimum(chunk * span + span, T)
    for m in range(chunk * span // INTERVAL, tl.cdiv(end, INTERVAL)):
        if KEEP:
            tl.store(states + (row * count + m) * EP * N + here, h, mask=inside)
        # tokens after the last one have delta = u = 0 and change nothing; loads stand before stores, so that a group
        # waits for memory once
        for first in range(m * INTERVAL, tl.minimum(m * INTERVAL + INTERVAL, T), GROUP):
            outputs = ()
            for i in tl.static_range(GROUP):
                d, value, b, c = token(u, delta, Bt, Ct, row, first + i, e, n, channel, slot, T, E, N)
                if DOCS:
                    h = tl.where(begins(docs, row, first + i, T), 0.0, h)
                h = tl.exp2(d[:, None] * decay) * h + (d * value)[:, None] * b[None, :]
                outputs = outputs + (tl.sum(h * c[None, :], 1),)  # noqa: RUF005 (Triton knows no stars)
            for i in tl.static_range(GROUP):
                at = (row * T + first + i) * E + e
                tl.store(y + at, outputs[i].to(y.dtype.element_ty), mask=channel & (first + i < T))
    if end == T:
        tl.store(last + row * E * N + here, h, mask=inside)


def forward(u, delta, A, B, C, initial_state, doc_ids, interval, y, last, states) -> None:
    """Fill y, last and (unless None) states. A, states: float32; the others of one dtype; everything contiguous."""
    (batch, T, E), N = u.shape, A.shape[1]
    config = gpu.options("selective_scan_forward", u, FORWARD, N=N)
    chunks, span = parts(batch, T, triton.cdiv(E, config["BE"]) * config["num_warps"], interval)
    if chunks > 1:
        initial_state = chunk_starts(u, delta, A, B, doc_ids, initial_state, chunks, span, reverse=False)
    none, width = last, E if states is None else states.shape[2]  # a pointer that is not read
    with gpu.launching(u):
        selective_scan_forward[(triton.cdiv(E, config["BE"]), chunks, batch)](
            u, delta, A, B, C, none if initial_state is None else initial_state, none if doc_ids is None else doc_ids,
            y, last, none if states is None else states, T, span, E, N, width, NP=padded(N), INTERVAL=interval,
            GROUP=1 if T == 1 else 4, START=initial_state is not None, DOCS=doc_ids is not None,
            KEEP=states is not None, **config,
        )  # fmt: skip


backward = triton_backward.backward


def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None, doc_ids: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `zoo.kernels.selective_scan.selective_scan`. One token is the same kernel."""
    delta, B, C = (x.to(u.dtype) for x in (delta, B, C))
    return fused.selective_scan(
        u, delta, A.to(wide(u.dtype)), B, C, initial_state, doc_ids, INTERVAL, sys.modules[__name__]
    )


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    """What tools/aot.py compiles: realistic calls on meta tensors, forward, backward and one token."""

    def call(name, batch, E, N, docs=False):
        u = torch.empty(batch, 4096, E, dtype=torch.bfloat16, device="meta")
        A, B = u.new_empty(E, N, dtype=torch.float32), u.new_empty(batch, 4096, N)
        ids = u.new_empty(batch, 4096, dtype=torch.int64) if docs else None
        h, states = A.new_empty(batch, E, N), A.new_empty(batch, 4096 // INTERVAL, E, N)

        def both():
            forward(u, u, A, B, B, h, ids, INTERVAL, u, h, states)
            backward(u, h, u, u, A, B, B, ids, states, INTERVAL)

        return f"{name} {E}x{N}", both

    yield call("plain", 2, 2048, 16)
    yield call("documents", 2, 2048, 16, docs=True)
    u = torch.empty(2, 1, 2048, dtype=torch.bfloat16, device="meta")
    B, A, h = u.new_empty(2, 1, 16), u.new_empty(2048, 16, dtype=torch.float32), u.new_empty(2, 2048, 16).float()
    yield "step 2048x16", lambda: forward(u, u, A, B, B, h, None, INTERVAL, u, h, None)
