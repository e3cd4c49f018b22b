"""The selective scan against closed forms, linear attention and its token loop; what it keeps and how it scales."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from zoo.kernels.linear_attention import linear_attention
from zoo.kernels.selective_scan import flops, selective_scan

BACKENDS = ("reference", "chunked")


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def arguments(B, T, E, N, dtype=torch.float64, step=1.0):
    u, delta, A = draw(B, T, E), step * F.softplus(draw(B, T, E, seed=1)), -draw(E, N, seed=2).exp()
    return [t.to(dtype) for t in (u, delta, A, draw(B, T, N, seed=3), draw(B, T, N, seed=4), draw(E, seed=5))]


class Watch(TorchDispatchMode):
    """The largest tensor that any operation makes, and the elements of all of them."""

    def __init__(self):
        super().__init__()
        self.largest = self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self.largest, self.total = max(self.largest, t.numel()), self.total + t.numel()
        return out


@pytest.mark.parametrize("backend", BACKENDS)
def test_with_constant_step_and_maps_it_is_a_convolution(backend):
    u, _, A, _, _, D = arguments(2, 37, 3, 4)
    delta, b, c = draw(3, seed=7).abs(), draw(4, seed=8), draw(4, seed=9)
    steps = torch.arange(37)[:, None, None]
    kernel = (c * torch.exp(steps * delta[:, None] * A) * delta[:, None] * b).sum(-1)  # [T, E]
    want = F.conv1d(F.pad(u.transpose(1, 2), (36, 0)), kernel.t().flip(1)[:, None], groups=3).transpose(1, 2) + D * u
    constant = [t.expand(2, 37, -1) for t in (delta, b, c)]
    y, _ = selective_scan(u, constant[0], A, constant[1], constant[2], D, chunk_size=8, backend=backend)
    torch.testing.assert_close(y, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_of_zero_freezes_the_state(backend):
    u, delta, A, B, C, D = arguments(2, 20, 3, 4)
    h0 = draw(2, 3, 4, seed=6)
    y, state = selective_scan(u, torch.zeros_like(delta), A, B, C, D, initial_state=h0, backend=backend)
    assert torch.equal(state, h0)
    torch.testing.assert_close(y, torch.einsum("ben,btn->bte", h0, C) + D * u)


def test_with_one_decay_for_all_states_it_is_mamba2():
    B, T, H, P, N = 2, 50, 2, 3, 4
    u, dt, A = draw(B, T, H, P), F.softplus(draw(B, T, H, seed=1)), -draw(H, seed=2).exp()
    b, c = draw(B, T, N, seed=3), draw(B, T, N, seed=4)
    want, memory = linear_attention(c[:, :, None], b[:, :, None], dt[..., None] * u, dt * A, chunk_size=16)
    each = A.repeat_interleave(P)[:, None].expand(-1, N)
    y, state = selective_scan(u.flatten(2), dt.repeat_interleave(P, -1), each, b, c, chunk_size=8)
    torch.testing.assert_close(y, want.flatten(2))
    torch.testing.assert_close(state, memory.transpose(-1, -2).flatten(1, 2))


@pytest.mark.parametrize("T", [1, 2, 15, 16, 17, 63, 130])
@pytest.mark.parametrize("packed", [False, True])
def test_chunked_equals_the_loop(T, packed):
    inputs = [*arguments(2, T, 3, 4), draw(2, 3, 4, seed=6)]
    doc_ids = (torch.arange(T) // 7 + torch.tensor([[0], [3]])) if packed else None
    results = []
    for backend in BACKENDS:
        leaves = [t.clone().requires_grad_() for t in inputs]
        y, state = selective_scan(*leaves[:6], initial_state=leaves[6], doc_ids=doc_ids, backend=backend)
        loss = (y * draw(*y.shape, seed=7)).sum() + state.square().sum()
        results.append((y, state, *torch.autograd.grad(loss, leaves)))
    torch.testing.assert_close(*results, atol=1e-10, rtol=1e-10)


def test_derivatives_of_both_orders():
    inputs = [t.requires_grad_() for t in [*arguments(1, 5, 2, 2), draw(1, 2, 2, seed=6)]]

    def scan(u, delta, A, B, C, D, h0):
        return selective_scan(u, delta, A, B, C, D, initial_state=h0, chunk_size=2)

    assert torch.autograd.gradcheck(scan, inputs)
    assert torch.autograd.gradgradcheck(scan, inputs)


@pytest.mark.parametrize("cuts", [[1] * 40, [16, 24], [7, 1, 32], [39, 1]])
def test_state_continues_a_sequence(cuts):
    u, delta, A, B, C, D = arguments(2, 40, 3, 4)
    want, end = selective_scan(u, delta, A, B, C, D)
    state, pieces = None, []
    for parts in zip(*(t.split(cuts, 1) for t in (u, delta, B, C))):
        y, state = selective_scan(*parts[:2], A, *parts[2:], D, initial_state=state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), want, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(state, end, atol=1e-12, rtol=1e-12)


def test_is_causal_and_keeps_rows_apart():
    u, *rest = arguments(2, 40, 3, 4)
    other = u.clone()
    other[0, 21:] += 1
    a, b = (selective_scan(t, *rest)[0] for t in (u, other))
    assert torch.equal(a[0, :21], b[0, :21]) and torch.equal(a[1], b[1]) and not torch.equal(a[0, 21:], b[0, 21:])


@pytest.mark.parametrize("step", [1e-3, 1.0, 100.0])
def test_single_precision_at_any_step(step):
    exact = arguments(1, 300, 8, 4, step=step)
    want, _ = selective_scan(*exact, backend="reference")
    leaves = [t.float().requires_grad_() for t in exact]
    y, _ = selective_scan(*leaves)
    assert (y - want).norm() / want.norm() < 1e-6
    y.sum().backward()
    assert all(t.grad.isfinite().all() for t in leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes(backend):
    u, delta, A, B, C, D = arguments(1, 20, 3, 4, torch.bfloat16)
    y, state = selective_scan(u, delta.float(), A.float(), B, C, D.float(), backend=backend)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    want, _ = selective_scan(*(t.double() for t in (u, delta, A, B, C, D)), backend="reference")
    assert (y - want).norm() / want.norm() < 1e-2


def test_memory_and_work_of_training():
    E, N, work = 32, 16, []
    for T in (128, 256):
        leaves = [t.requires_grad_() for t in arguments(1, T, E, N, torch.float32)]
        with Watch() as watch:  # sees what is kept, too
            selective_scan(*leaves)[0].sum().backward()
        assert watch.largest <= 17 * E * N  # a slab, or a state a slab; never [B, T, E, N]
        work.append(watch.total)
    assert work[1] < 2.1 * work[0]


def test_compiles_and_exports_as_one_graph():
    def loss(*args):
        y, state = selective_scan(*args)
        return y.square().sum() + state.sum()

    args = [t.requires_grad_() for t in arguments(2, 70, 3, 4)]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got, want = (torch.autograd.grad(f(*args), args) for f in (compiled, loss))
    torch.testing.assert_close(got, want)

    class Scan(torch.nn.Module):
        def forward(self, *args):
            return selective_scan(*args)[0]

    args = tuple(t.detach() for t in args)
    program = torch.export.export(Scan(), args)
    assert not any("zoo" in str(node.target) for node in program.graph.nodes)  # loads without this package
    torch.testing.assert_close(program.module()(*args), Scan()(*args))


def test_the_opaque_operator_is_registered_rightly():
    from zoo.kernels.selective_scan.chunked import _opaque_forward

    u, delta, A, B, C, _ = arguments(1, 10, 3, 2)
    same = torch.ones(1, 10, dtype=torch.float64)
    args = [t.requires_grad_() for t in (u, delta, A.t().contiguous(), B, C, draw(1, 2, 3, seed=6))]
    torch.library.opcheck(_opaque_forward, (*args, same, 4))
    with FlopCounterMode(display=False) as counter:
        _opaque_forward(*args, same, 4)
    assert counter.get_total_flops() == flops(1, 10, 3, 2)


def test_flops():
    args = arguments(2, 37, 8, 4, torch.float32)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        selective_scan(*args)
    assert counter.get_total_flops() == flops(2, 37, 8, 4)
