"""Causal flow attention against the released equations, and what its mathematics promises."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from zoo.blocks.flow_attention import FlowAttention

DIM, T = 64, 37


def redraw(module: nn.Module) -> nn.Module:
    gen = torch.Generator().manual_seed(0)
    for p in module.parameters():
        with torch.no_grad():
            p.copy_(torch.randn(p.shape, generator=gen, dtype=torch.float64) / p[0].numel() ** 0.5)
    return module.double()


def tokens(seed=1, length=T):
    return torch.randn(2, length, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def token_loop(block, x):
    """One token after the other, every sum taken over the tokens so far."""
    H, eps = block.num_heads, 1e-6
    q, k, v = (p(x).unflatten(-1, (H, -1)) for p in block.projections()[:3])
    q, k = q.sigmoid(), k.sigmoid()
    incoming, outgoing, source, out = [], [], [], []
    for n in range(x.shape[1]):
        t, past = n + 1, slice(0, n + 1)
        incoming.append(t / ((q[:, n] + eps) * (k[:, past].sum(1) + eps)).sum(-1))
        outgoing.append(t / ((k[:, n] + eps) * (q[:, past].sum(1) + eps)).sum(-1))
        a, b = torch.stack(incoming, 1)[..., None], torch.stack(outgoing, 1)[..., None]
        sink = ((q[:, n] + eps) * ((k[:, past] * b).sum(1) + eps)).sum(-1) / t
        r = ((k[:, n] + eps) * ((q[:, past] * a).sum(1) + eps)).sum(-1) / t
        source.append(r.clamp(-block.source_clamp, block.source_clamp).exp())
        # each source keeps the share that it had when it came
        c = torch.stack([s / torch.stack(source[: j + 1]).sum(0) * (j + 1) for j, s in enumerate(source)], 1)
        scores = torch.einsum("bhd,bjhd->bjh", q[:, n] * incoming[n][..., None] / t, k[:, past])
        out.append(sink.sigmoid()[..., None] * torch.einsum("bjh,bjhe->bhe", scores * c, v[:, past]))
    return block.out_projection(torch.stack(out, 1).flatten(-2))


@pytest.mark.parametrize("clamp", [1.0, 10.0])
def test_it_is_the_token_loop(clamp):
    block, x = redraw(FlowAttention(DIM, source_clamp=clamp, chunk_size=16)), tokens()
    torch.testing.assert_close(block(x), token_loop(block, x), atol=1e-11, rtol=1e-11)


def released(block, x):
    """Wu et al.'s code restated: cumulative sums over the row, in the head-major layout."""
    eps, H = 1e-6, block.num_heads
    q, k, v = (p(x).unflatten(-1, (H, -1)).transpose(1, 2) for p in block.projections()[:3])
    q, k, n = q.sigmoid(), k.sigmoid(), torch.arange(1, x.shape[1] + 1)

    def dot(a, b):
        return torch.einsum("nhld,nhld->nhl", a + eps, b + eps)

    sink_in, source_out = n / dot(q, k.cumsum(2)), n / dot(k, q.cumsum(2))
    sink = dot(q, (k * source_out[..., None]).cumsum(2)) / n
    source = (dot(k, (q * sink_in[..., None]).cumsum(2)) / n).clamp(-1, 1).exp()
    v = v * (source / source.cumsum(-1) * n)[..., None]
    memory = torch.einsum("nhld,nhlm->nhldm", k, v).cumsum(2)
    o = torch.einsum("nhld,nhldm->nhlm", q * (sink_in / n)[..., None], memory) * sink.sigmoid()[..., None]
    return block.out_projection(o.transpose(1, 2).flatten(-2))


def test_it_is_the_released_code_forward_and_backward():
    block, x = redraw(FlowAttention(DIM, num_heads=4, chunk_size=16)), tokens().requires_grad_()
    want, got = released(block, x), block(x)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)
    weight = torch.linspace(-1, 1, want.numel(), dtype=want.dtype).view_as(want)
    leaves = [x, *block.parameters()]
    for a, b in zip(
        torch.autograd.grad((got * weight).sum(), leaves), torch.autograd.grad((want * weight).sum(), leaves)
    ):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def test_the_first_token_meets_only_itself():
    """Its normalisers are its own, so both conserved flows are 1 and sigmoid(1) v is left."""
    block, x = redraw(FlowAttention(DIM, num_heads=4)), tokens(length=1)
    block.eps = 0.0
    want = block.out_projection(torch.ones(()).double().sigmoid() * block.value_projection(x))
    torch.testing.assert_close(block(x), want, atol=1e-12, rtol=1e-12)


def test_scaling_the_values_scales_the_output():
    block, x = redraw(FlowAttention(DIM)), tokens()
    with torch.no_grad():
        once = block(x) - block.out_projection.bias
        block.value_projection.weight *= 3
        block.value_projection.bias *= 3
        torch.testing.assert_close(block(x) - block.out_projection.bias, 3 * once, atol=1e-12, rtol=1e-12)


def test_float32_over_a_long_row_of_documents():
    block, x = redraw(FlowAttention(DIM)), tokens(length=1500)
    ids = torch.repeat_interleave(torch.arange(3), torch.tensor([1400, 1, 99])).expand(2, -1)
    want = torch.cat([block(part) for part in x.split([1400, 1, 99], 1)], 1)
    torch.testing.assert_close(block(x, doc_ids=ids), want, atol=1e-11, rtol=1e-11)
    single = FlowAttention(DIM)
    single.load_state_dict({n: p.float() for n, p in block.state_dict().items()})
    got = single(x.float(), doc_ids=ids)
    assert (got - want).norm() / want.norm() < 5e-6


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="num_heads=5 must divide"):
        FlowAttention(DIM, num_heads=5)
