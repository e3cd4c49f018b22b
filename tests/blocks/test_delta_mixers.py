"""KDA and DeltaNet against Hugging Face, their recurrences token by token and closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.blocks.deltanet import DeltaNet
from zoo.blocks.gated_deltanet import GatedDeltaNet
from zoo.blocks.kda import KimiDeltaAttention

DIM, T = 64, 45


def redraw(module: nn.Module, seed: int = 0) -> nn.Module:
    """Weights of order one, where a fresh layer is nearly silent."""
    gen = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        with torch.no_grad():
            draw = torch.randn(p.shape, generator=gen, dtype=torch.float64)
            p.copy_(draw / p[0].numel() ** 0.5 if p.ndim > 1 and p.shape[0] > 1 else 1 + 0.3 * draw)
    return module.double()


def tokens(seed: int = 1) -> Tensor:
    return torch.randn(2, T, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def conv(x: Tensor, weight: Tensor) -> Tensor:
    W = weight.shape[-1]
    return F.silu(F.conv1d(F.pad(x.mT, (W - 1, 0)), weight, groups=x.shape[-1]).mT)


def unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def head_norm(o: Tensor, weight: Tensor) -> Tensor:
    return (o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight).flatten(-2)


def recurrence(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, alpha: Tensor) -> Tensor:
    """S_t = (I - beta_t k_t k_t^T) diag(alpha_t) S_{t-1} + beta_t k_t v_t^T, o_t = S_t^T q_t / sqrt(Dk), as written."""
    B, steps, H, Dk = k.shape
    S, eye, o = k.new_zeros(B, H, Dk, v.shape[-1]), torch.eye(Dk, dtype=k.dtype), []
    for t in range(steps):
        b, kt = beta[:, t, :, None, None], k[:, t, :, :, None]
        S = (eye - b * kt @ kt.mT) @ (alpha[:, t, :, :, None] * S) + b * kt @ v[:, t, :, None]
        o.append((S.mT @ q[:, t, :, :, None])[..., 0] * Dk**-0.5)
    return torch.stack(o, 1)


# ------------------------------------------------------------------------------------------------------------ KDA
@pytest.mark.parametrize("negative", [False, True])
def test_kda_is_its_recurrence(negative):
    block, x = redraw(KimiDeltaAttention(DIM, num_heads=4, allow_neg_eigval=negative, chunk_size=16)), tokens()
    qkv = conv(torch.cat([block.q_proj(x), block.k_proj(x), block.v_proj(x)], -1), block.conv1d.weight)
    q, k, v = (t.unflatten(-1, (4, 16)) for t in qkv.chunk(3, -1))
    beta = block.b_proj(x).sigmoid() * (1 + negative)
    f = block.forget_gate
    step = F.softplus(f.f_b_proj(f.f_a_proj(x)) + f.dt_bias).unflatten(-1, (4, 16))
    alpha = (-f.A_log.exp() * step).exp()
    o = head_norm(recurrence(unit(q), unit(k), v, beta, alpha), block.o_norm.weight)
    want = block.o_proj(o * block.g_b_proj(block.g_a_proj(x)).sigmoid())
    torch.testing.assert_close(block(x), want, atol=1e-10, rtol=1e-10)


def test_kda_is_kimi_linear():
    """Whole sequence, and their prefill and single steps against our state; weights go over by name."""
    from transformers import DynamicCache, KimiLinearConfig
    from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention

    config = KimiLinearConfig(
        hidden_size=DIM, linear_num_heads=4, linear_head_dim=24, linear_conv_kernel_dim=4, num_hidden_layers=1,
        layer_types=["linear_attention"],
    )  # fmt: skip
    theirs = redraw(KimiLinearDeltaAttention(config, 0)).float()
    ours = KimiDeltaAttention(DIM, num_heads=4, head_dim=24, chunk_size=16)
    ours.load_state_dict(theirs.state_dict())
    x = tokens().float()
    with torch.no_grad():
        want = theirs(x)
        torch.testing.assert_close(ours.double()(x.double()).float(), want, atol=2e-5, rtol=2e-4)
        ours.float()
        cache, state = DynamicCache(config=config), ours.init_state(2)
        for part in x.split([30, 1, 1, 13], 1):
            got = ours(part, state=state)
            torch.testing.assert_close(got, theirs(part, cache_params=cache), atol=2e-5, rtol=2e-4)
    torch.testing.assert_close(state.memory, cache.layers[0].recurrent_states[0], atol=2e-5, rtol=2e-4)


def test_kda_with_a_bounded_gate_is_glm5_next():
    from transformers.models.glm5_next.configuration_glm5_next import Glm5NextTextConfig
    from transformers.models.glm5_next.modeling_glm5_next import Glm5NextTextLinearAttention

    config = Glm5NextTextConfig(
        hidden_size=DIM, linear_num_heads=2, linear_head_dim=16, linear_conv_kernel_dim=4, linear_lower_bound=-5.0,
        num_hidden_layers=1, layer_types=["linear_attention"],
    )  # fmt: skip
    theirs = redraw(Glm5NextTextLinearAttention(config, 0)).float()
    ours = KimiDeltaAttention(
        DIM, num_heads=2, head_dim=16, gate_lower_bound=-5.0, norm_eps=config.rms_norm_eps, chunk_size=16
    )
    weights = theirs.state_dict()
    weights["forget_gate.A_log"] = weights["forget_gate.A_log"].view(1, 1, 2, 1)
    ours.load_state_dict(weights)
    x = tokens().float()
    with torch.no_grad():
        torch.testing.assert_close(ours.double()(x.double()).float(), theirs(x), atol=2e-5, rtol=2e-4)


def test_kda_with_equal_decays_in_a_head_is_gated_deltanet():
    """The default gate with W_2 constant over a head, convolutions included."""
    kda = redraw(KimiDeltaAttention(DIM, num_heads=4, output_gate=False, chunk_size=16))
    gdn = redraw(GatedDeltaNet(DIM, num_heads=4, head_dim=16, expand_v=1.0, output_gate=False), seed=1)
    gate, weights = kda.forget_gate, gdn.state_dict()
    with torch.no_grad():
        gate.f_b_proj.weight.copy_(gate.f_b_proj.weight[::16].repeat_interleave(16, 0))
        gate.dt_bias.copy_(gate.dt_bias[::16].repeat_interleave(16))
    shared = {n: p for n, p in kda.state_dict().items() if n in weights}
    convs = zip("qkv", kda.conv1d.weight.detach().chunk(3))
    gdn.load_state_dict(shared | {f"{n}_conv1d.weight": w for n, w in convs} | {
        "a_proj.weight": gate.f_b_proj.weight.detach()[::16] @ gate.f_a_proj.weight.detach(),
        "A_log": gate.A_log.detach().flatten(),
        "dt_bias": gate.dt_bias.detach()[::16],
    })  # fmt: skip
    x = tokens()
    torch.testing.assert_close(kda(x), gdn(x), atol=1e-11, rtol=1e-11)


def test_kda_without_writing_is_silent():
    block = redraw(KimiDeltaAttention(DIM, num_heads=4, chunk_size=16))
    with torch.no_grad():
        block.b_proj.weight.zero_()
        block.b_proj.weight -= 1e3 * torch.ones(DIM)  # beta = sigmoid(-1000 sum x) = 0
    assert block(tokens().abs()).abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kda_survives_a_decay_of_e_to_the_60_each_token(dtype):
    """Forward and backward are finite, and nothing but the last token is left."""
    block = redraw(KimiDeltaAttention(DIM, num_heads=4, conv_size=0, chunk_size=16)).to(dtype)
    with torch.no_grad():
        block.forget_gate.dt_bias.fill_(60.0)
        block.forget_gate.A_log.zero_()
    x = tokens().to(dtype).requires_grad_()
    y = block(x)
    torch.testing.assert_close(y[:, 20:21], block(x[:, 20:21]), atol=1e-5, rtol=1e-5)
    for grad in torch.autograd.grad(y.square().sum(), [x, *block.parameters()]):
        assert grad.isfinite().all()


def test_initial_decays_of_kda():
    torch.manual_seed(0)
    gate = KimiDeltaAttention(512, num_heads=64, head_dim=8).forget_gate
    rate, step = gate.A_log.exp(), F.softplus(gate.dt_bias)
    assert rate.min() >= 0.999 and rate.max() <= 16 and abs(rate.mean() - 8.5) < 2
    assert step.min() >= 1e-3 * 0.999 and step.max() <= 1e-1 * 1.001
    bounded = KimiDeltaAttention(64, gate_lower_bound=-5.0)
    assert bounded.forget_gate.A_log.abs().max() == 0
    g = bounded.log_decay(tokens().float())
    assert g.max() < 0 and g.min() > -5


# ------------------------------------------------------------------------------------------------------- DeltaNet
def deltanet_inputs(block: DeltaNet, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q [B, T, H, Dk], and k, v, beta of every update, [B, T, n, H, ...]."""
    n, H = block.updates, block.num_heads
    q, k, v = (
        conv(getattr(block, f"{name}_proj")(x), getattr(block, f"{name}_conv1d").weight) for name in ("q", "k", "v")
    )
    beta = block.b_proj(x).sigmoid() * (2 if block.allow_neg_eigval else 1)
    return (
        unit(q.unflatten(-1, (H, -1))),
        unit(k.unflatten(-1, (n, H, -1))),
        v.unflatten(-1, (n, H, -1)),
        beta.unflatten(-1, (n, H)),
    )


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_deltanet_is_its_recurrence(n, gated):
    """DeltaProduct as its paper has it: the n updates of a token, one after the other, on one state."""
    decay = "head" if gated else "none"
    block = redraw(
        DeltaNet(
            DIM, num_heads=2, head_dim=8, expand_v=2.0, num_householder=n, decay=decay, allow_neg_eigval=n > 1,
            output_gate=gated, chunk_size=16,
        )
    )  # fmt: skip
    x = tokens()
    q, k, v, beta = deltanet_inputs(block, x)
    S, eye, o = x.new_zeros(2, 2, 8, 16), torch.eye(8, dtype=x.dtype), []
    for t in range(T):
        if gated:
            step = F.softplus(block.a_proj(x[:, t]) + block.dt_bias)
            S = (-block.A_log.exp() * step).exp()[..., None, None] * S
        for j in range(n):
            b, kt = beta[:, t, j, :, None, None], k[:, t, j, :, :, None]
            S = (eye - b * kt @ kt.mT) @ S + b * kt @ v[:, t, j, :, None]
        o.append((S.mT @ q[:, t, :, :, None])[..., 0] * 8**-0.5)
    y = head_norm(torch.stack(o, 1), block.o_norm.weight)
    want = block.o_proj(y * F.silu(block.g_proj(x)) if gated else y)
    torch.testing.assert_close(block(x), want, atol=1e-10, rtol=1e-10)
    state = block.init_state(2)
    pieces = [block(part, state=state) for part in x.split([20, 1, 1, 23], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), want, atol=1e-10, rtol=1e-10)


def test_deltanet_in_its_quadratic_form():
    """O = tril(Q K^T) (I + strict(diag(beta) K K^T))^-1 diag(beta) V."""
    block, x = redraw(DeltaNet(DIM, num_heads=4, chunk_size=16)), tokens()
    q, k, v, beta = (t.flatten(2, 3).transpose(1, 2) if i else t.transpose(1, 2) for i, t in
                     enumerate(deltanet_inputs(block, x)))  # fmt: skip
    solve = torch.eye(T, dtype=x.dtype) + (beta[..., None] * (k @ k.mT)).tril(-1)
    o = (q @ k.mT).tril() @ torch.linalg.solve(solve, beta[..., None] * v) / 4
    want = block.o_proj(head_norm(o.transpose(1, 2), block.o_norm.weight))
    torch.testing.assert_close(block(x), want, atol=1e-10, rtol=1e-10)


def test_idle_updates_of_deltaproduct_change_nothing():
    """beta = 0 in all but one update of a token leaves DeltaNet with the keys and values of that one."""
    many = redraw(DeltaNet(DIM, num_heads=4, num_householder=3, conv_size=0, chunk_size=16))
    one = redraw(DeltaNet(DIM, num_heads=4, conv_size=0, chunk_size=16))
    x = tokens().abs()
    with torch.no_grad():
        many.b_proj.weight[:4] = many.b_proj.weight[8:] = -1e3  # sigmoid(-1000 sum x) = 0
        shared = {n: p.unflatten(0, (3, -1))[1] if n[0] in "kvb" else p for n, p in many.state_dict().items()}
        one.load_state_dict(shared)
    torch.testing.assert_close(many(x), one(x), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("beta", "want"), [(20.0, "replaced"), (-20.0, "kept")])
def test_deltanet_writes_what_it_will_read(beta, want):
    """beta = 1: reading a key right after its write gives the value, whatever was there; beta = 0: the state stays."""
    block = DeltaNet(DIM, num_heads=4, chunk_size=16).double()
    gen = torch.Generator().manual_seed(0)
    k, memory = (torch.randn(2, 1, 4, 16, generator=gen).double(), torch.randn(2, 4, 16, 16, generator=gen).double())
    k, v = k / k.norm(dim=-1, keepdim=True), torch.randn(2, 1, 4, 16, generator=gen).double()
    write = torch.full((2, 1, 4), beta).double().sigmoid()
    o, after = block.mix(4 * k, k, v, write, None, memory, None)  # the scale is 1/4
    if want == "replaced":
        torch.testing.assert_close(o, v, atol=1e-7, rtol=1e-7)
        torch.testing.assert_close(block.mix(k, k, v, write, None, after, None)[1], after, atol=1e-7, rtol=1e-7)
    else:
        torch.testing.assert_close(after, memory, atol=1e-7, rtol=1e-7)


def test_a_doubled_beta_is_a_reflection():
    """With beta = 2 and nothing to write, every update keeps the norm of the state; two of the same undo each other."""
    block = DeltaNet(DIM, num_heads=4, num_householder=2, allow_neg_eigval=True, chunk_size=16).double()
    gen = torch.Generator().manual_seed(0)
    memory, zero = torch.randn(2, 4, 16, 16, generator=gen).double(), torch.zeros(2, 5, 8, 16).double()
    k = torch.randn(2, 5, 8, 16, generator=gen).double()
    k, beta = k / k.norm(dim=-1, keepdim=True), torch.full((2, 5, 8), 2.0).double()
    after = block.mix(k[:, :, :4], k, zero, beta, None, memory, None)[1]
    torch.testing.assert_close(after.norm(dim=(-2, -1)), memory.norm(dim=(-2, -1)), atol=1e-12, rtol=1e-12)
    k = k[:, :, :4].repeat(1, 1, 2, 1)
    torch.testing.assert_close(block.mix(k[:, :, :4], k, zero, beta, None, memory, None)[1], memory, atol=1e-12, rtol=0)


def test_negative_eigenvalues_tell_parity():
    """A state that is turned by every 1 of a string of bits: its sign is the parity. Below beta = 1 it only shrinks."""
    bits = torch.randint(2, (1, 60), generator=torch.Generator().manual_seed(0))
    k = torch.ones(1, 60, 4, 1).double()
    for negative, sign in ((True, 1 - 2 * (bits.cumsum(1) % 2)), (False, torch.ones_like(bits))):
        block = DeltaNet(4, num_heads=4, allow_neg_eigval=negative, chunk_size=16).double()
        beta = bits[..., None].expand(-1, -1, 4).double() * (2.0 if negative else 0.9)
        o, _ = block.mix(k, k, torch.zeros_like(k), beta, None, torch.ones(1, 4, 1, 1).double(), None)
        assert torch.equal(o[..., 0].sign(), sign[..., None].expand(-1, -1, 4).double())


def test_deltanet_on_orthonormal_keys_is_linear_attention():
    block = DeltaNet(DIM, num_heads=4, head_dim=T, chunk_size=16).double()
    gen = torch.Generator().manual_seed(0)
    k = torch.linalg.qr(torch.randn(2, 4, T, T, generator=gen, dtype=torch.float64)).Q.transpose(1, 2)
    q, v = (torch.randn(2, T, 4, T, generator=gen, dtype=torch.float64) for _ in range(2))
    beta = torch.rand(2, T, 4, generator=gen, dtype=torch.float64)
    o, _ = block.mix(q, k, v, beta, None, None, None)
    scores = torch.einsum("bihd,bjhd->bhij", q, k).tril() * T**-0.5
    torch.testing.assert_close(o, torch.einsum("bhij,bjhd->bihd", scores, beta[..., None] * v), atol=1e-11, rtol=1e-11)


# ---------------------------------------------------------------------------------------------------------- both
@pytest.mark.parametrize("dim", [32, 64, 128, 256, 2048])
def test_defaults_build(dim):
    for cls in (KimiDeltaAttention, DeltaNet):
        cls(dim, device="meta")


def test_bad_combinations_are_refused():
    with pytest.raises(ValueError, match="needs decay='channel'"):
        KimiDeltaAttention(DIM, decay="head", gate_lower_bound=-5.0)
    with pytest.raises(ValueError, match="known"):
        KimiDeltaAttention(DIM, kernel="warp")
    with pytest.raises(ValueError, match="value channel"):
        DeltaNet(DIM, expand_v=0.01)
