"""Linear attention with a scalar gate per head, against its recurrence, its matrix form and its relatives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.blocks.gla import GatedLinearAttention
from zoo.blocks.retention import Retention
from zoo.blocks.simple_gla import SimpleGatedLinearAttention

DIM, T = 64, 45


def redraw(module: nn.Module) -> nn.Module:
    """Weights of order one, where a fresh layer is nearly silent."""
    gen = torch.Generator().manual_seed(0)
    for p in module.parameters():
        with torch.no_grad():
            draw = torch.randn(p.shape, generator=gen, dtype=torch.float64)
            p.copy_(draw / p[0].numel() ** 0.5 if p.ndim > 1 else 1 + 0.3 * draw)
    return module.double()


def tokens() -> Tensor:
    return torch.randn(2, T, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def finish(block: SimpleGatedLinearAttention, o: Tensor, x: Tensor) -> Tensor:
    assert block.o_norm is not None and block.g_proj is not None
    y = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * block.o_norm.weight
    return block.o_proj(y.flatten(-2) * F.silu(block.g_proj(x)))


def test_simple_gla_is_its_recurrence():
    block, x = redraw(SimpleGatedLinearAttention(DIM, expand_k=0.5, gate_logit_normalizer=2.0, chunk_size=16)), tokens()
    q, k = (p(x).unflatten(-1, (4, 8)) for p in (block.q_proj, block.k_proj))
    v = block.v_proj(x).unflatten(-1, (4, 16))
    alpha = block.gk_proj(x).sigmoid() ** 0.5
    S, o = x.new_zeros(2, 4, 8, 16), []
    for t in range(T):
        S = alpha[:, t, :, None, None] * S + k[:, t, ..., None] * v[:, t, :, None]
        o.append(torch.einsum("bhd,bhde->bhe", q[:, t], S) * 8**-0.5)
    torch.testing.assert_close(block(x), finish(block, torch.stack(o, 1), x), atol=1e-10, rtol=1e-10)


def test_simple_gla_is_a_masked_product():
    """(Q K^T * L) V with L_ij = the product of the gates behind j up to i."""
    block, x = redraw(SimpleGatedLinearAttention(DIM, chunk_size=16)), tokens()
    q, k, v = (p(x).unflatten(-1, (4, 16)).transpose(1, 2) for p in (block.q_proj, block.k_proj, block.v_proj))
    b = (F.logsigmoid(block.gk_proj(x)) / 16).cumsum(1).mT
    L = (b[..., :, None] - b[..., None, :]).tril().exp().tril()
    o = (q @ k.mT * L / 4) @ v
    torch.testing.assert_close(block(x), finish(block, o.transpose(1, 2), x), atol=1e-10, rtol=1e-10)


def test_simple_gla_is_gla_with_equal_gates_in_a_head():
    block, gla = SimpleGatedLinearAttention(DIM, chunk_size=16), GatedLinearAttention(DIM, expand_k=1.0, chunk_size=16)
    redraw(gla)
    low, up = gla.gate_layers()
    with torch.no_grad():
        up.weight.copy_(up.weight[::16].repeat_interleave(16, 0))
        up.bias.copy_(up.bias[::16].repeat_interleave(16))
    weights = {n: p for n, p in gla.state_dict().items() if not n.startswith("gk_proj")}
    weights |= {"gk_proj.weight": (up.weight[::16] @ low.weight).detach(), "gk_proj.bias": up.bias[::16].detach()}
    block.double().load_state_dict(weights)
    x = tokens()
    torch.testing.assert_close(block(x), gla(x), atol=1e-11, rtol=1e-11)


def test_simple_gla_with_constant_gates_is_retention():
    retention = redraw(Retention(DIM, num_heads=4, expand_v=1.0, rotary=False, chunk_size=16))
    block = SimpleGatedLinearAttention(DIM, gate_logit_normalizer=1.0, chunk_size=16).double()
    gamma = 1 - 2.0 ** (-5 - torch.arange(4, dtype=torch.float64))
    block.load_state_dict(retention.state_dict() | {
        "gk_proj.weight": torch.zeros(4, DIM), "gk_proj.bias": torch.logit(gamma),
    })  # fmt: skip
    x = tokens()
    torch.testing.assert_close(block(x), retention(x), atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("dim", [32, 64, 128, 256, 2048])
def test_defaults_build(dim):
    SimpleGatedLinearAttention(dim, device="meta")


def test_bad_widths_are_refused():
    with pytest.raises(ValueError, match="must divide"):
        SimpleGatedLinearAttention(DIM, num_heads=5)
