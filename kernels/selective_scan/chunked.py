"""Selective scan in slabs of C tokens. Forward keeps the state before each slab; backward rebuilds one slab at a
time, last to first, so that no [B, T, E, N] tensor ever exists and the work is O(T).

Inside, states are [B, N, E]: with E innermost every product runs over long contiguous rows, and the sums over N
and E are batched matrix products.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.kernels.chunking import wide
from zoo.kernels.diagonal_scan.chunked import linear_scan, same_document
from zoo.kernels.precision import no_autocast
from zoo.kernels.selective_scan.cost import flops

_MAX_TRACED_SLABS = 8


def _traceable() -> bool:
    # few operations whatever the length, and differentiable again; else a loop in place, which is faster
    return torch.compiler.is_compiling() or torch.is_grad_enabled()


def _forward_scan(a: Tensor, x: Tensor, h: Tensor) -> Tensor:
    """h_t = a_t h_{t-1} + x_t over dimension 1, from h; may overwrite x."""
    if _traceable():
        return linear_scan(a, x, h)
    for decay, row in zip(a.unbind(1), x.unbind(1)):
        h = row.addcmul_(decay, h)
    return x


def _adjoint_scan(a: Tensor, x: Tensor, g: Tensor) -> Tensor:
    """g_t = a_{t+1} g_{t+1} + x_t over dimension 1, g added to the last; may overwrite x."""
    if _traceable():
        following = torch.cat([torch.ones_like(a[:, :1]), a[:, 1:].flip(1)], 1)
        return linear_scan(following, x.flip(1), g).flip(1)
    rows = x.unbind(1)
    g = rows[-1].add_(g)
    for decay, row in zip(a.unbind(1)[:0:-1], rows[-2::-1]):
        g = row.addcmul_(decay, g)
    return x


def _slabs(seq_len: int, chunk_size: int) -> list[tuple[int, int]]:
    if torch.compiler.is_compiling():
        chunk_size = max(chunk_size, -(-seq_len // _MAX_TRACED_SLABS))
    return [(t, min(t + chunk_size, seq_len)) for t in range(0, seq_len, chunk_size)]


def _multipliers(delta: Tensor, A: Tensor, same: Tensor | None) -> Tensor:
    a = torch.exp(delta[:, :, None] * A)
    return a if same is None else a * same[:, :, None, None]


def _forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h0: Tensor, same: Tensor | None, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """u, delta [B, T, E]; A [N, E]; B, C [B, T, N]; h0 [B, N, E]; same [B, T] -> y [B, T, E] and the states
    before each slab and after the last one [B, slabs + 1, N, E]."""
    h, states, outputs = h0, [h0], []
    with no_autocast(u.device):
        for s, e in _slabs(u.shape[1], chunk_size):
            a = _multipliers(delta[:, s:e], A, None if same is None else same[:, s:e])
            x = (delta[:, s:e] * u[:, s:e])[:, :, None] * B[:, s:e, :, None]
            slab = _forward_scan(a, x, h)
            outputs.append((C[:, s:e, None] @ slab)[:, :, 0])
            h = slab[:, -1].clone()  # a view would keep the whole slab alive
            states.append(h)
    return torch.cat(outputs, 1), torch.stack(states, 1)


def _backward(
    dy: Tensor, dstates: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
    same: Tensor | None, states: Tensor, chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients with respect to u, delta, A, B, C, h0."""
    dA, parts = torch.zeros_like(A), []
    carry = dstates[:, -1]  # gradient with respect to the state after the slab
    with no_autocast(u.device):
        for i, (s, e) in reversed(list(enumerate(_slabs(u.shape[1], chunk_size)))):
            u_s, delta_s, B_s, C_s, dy_s = (x[:, s:e] for x in (u, delta, B, C, dy))
            a = _multipliers(delta_s, A, None if same is None else same[:, s:e])
            du_s = delta_s * u_s
            h = _forward_scan(a, du_s[:, :, None] * B_s[..., None], states[:, i])
            G = _adjoint_scan(a, dy_s[:, :, None] * C_s[..., None], carry)
            dinput = (B_s[:, :, None] @ G)[:, :, 0]
            before = torch.cat([states[:, i, None], h[:, :-1]], 1)
            dlog = G * a * before  # gradient with respect to delta_t A
            dA = dA + (dlog * delta_s[:, :, None]).sum((0, 1))
            ddelta = (dlog * A).sum(2) + dinput * u_s
            parts.append((dinput * delta_s, ddelta, (G @ du_s[..., None])[..., 0], (h @ dy_s[..., None])[..., 0]))
            carry = a[:, 0] * G[:, 0] + dstates[:, i]
    du, ddelta, dB, dC = (torch.cat(p[::-1], 1) for p in zip(*parts))
    return du, ddelta, dA, dB, dC, carry


def _setup_context(ctx, inputs, output) -> None:
    u, delta, A, B, C, _, same, chunk_size = inputs
    ctx.save_for_backward(u, delta, A, B, C, same, output[1])
    ctx.chunk_size = chunk_size


class _SelectiveScan(torch.autograd.Function):
    forward = staticmethod(_forward)
    setup_context = staticmethod(_setup_context)

    @staticmethod
    def backward(ctx, dy, dstates):
        return *_backward(dy, dstates, *ctx.saved_tensors, chunk_size=ctx.chunk_size), None, None


@torch.library.custom_op("zoo::selective_scan", mutates_args=())
def _opaque_forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h0: Tensor, same: Tensor | None, chunk_size: int
) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return _forward(u, delta, A, B, C, h0, same, chunk_size)


@_opaque_forward.register_fake
def _(u, delta, A, B, C, h0, same, chunk_size):
    slabs = -(-u.shape[1] // chunk_size)
    return torch.empty_like(u, memory_format=torch.contiguous_format), h0.new_empty(h0.shape[0], slabs + 1, *A.shape)


@torch.library.custom_op("zoo::selective_scan_backward", mutates_args=())
def _opaque_backward(
    dy: Tensor, dstates: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
    same: Tensor | None, states: Tensor, chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    with torch.no_grad():
        return _backward(dy, dstates, u, delta, A, B, C, same, states, chunk_size)


@_opaque_backward.register_fake
def _(dy, dstates, u, delta, A, B, C, same, states, chunk_size):
    shapes = (u.shape, u.shape, A.shape, B.shape, C.shape, states[:, 0].shape)
    return tuple(u.new_empty(shape) for shape in shapes)


def _opaque_gradient(ctx, dy, dstates):
    return *_opaque_backward(dy, dstates, *ctx.saved_tensors, ctx.chunk_size), None, None


_opaque_forward.register_autograd(_opaque_gradient, setup_context=_setup_context)


@register_flop_formula(torch.ops.zoo.selective_scan)
def _opaque_flops(u, delta, A, *args, out_shape=None, **kwargs) -> int:
    return flops(*u, state_dim=A[0])


@register_flop_formula(torch.ops.zoo.selective_scan_backward)
def _opaque_backward_flops(dy, dstates, u, delta, A, *args, out_shape=None, **kwargs) -> int:
    return 3 * flops(*u, state_dim=A[0])  # gradients of B, C and of the inputs


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
    """See `zoo.kernels.selective_scan.selective_scan`."""
    dtype = wide(u.dtype)
    u, delta, A, B, C = (x.to(dtype) for x in (u, delta, A, B, C))
    if initial_state is None:
        h0 = A.new_zeros(u.shape[0], A.shape[1], A.shape[0])
    else:
        h0 = initial_state.to(dtype).transpose(1, 2)
    same = None if doc_ids is None else same_document(doc_ids).to(dtype)
    if torch.compiler.is_exporting():
        scan = _forward
    else:
        scan = _opaque_forward if torch.compiler.is_compiling() else _SelectiveScan.apply
    y, states = scan(u, delta, A.t().contiguous(), B, C, h0, same, chunk_size)
    return y, states[:, -1].transpose(1, 2)
