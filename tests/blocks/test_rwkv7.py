"""RWKV-7 against its equations written as loops over tokens and heads, with the state as the paper writes it."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

import zoo
from zoo.blocks.mlp import MLP
from zoo.blocks.rwkv7 import RWKV7
from zoo.blocks.rwkv7_ffn import RWKV7FeedForward
from zoo.conformance.subject import stir
from zoo.kernels.linear_attention import linear_attention


def build(block, seed=0, **options):
    torch.manual_seed(seed)
    return stir(block(32, dtype=torch.float64, **options), seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lora(p, name, x, f):
    y = f(x @ p[f"{name}.lora.0.weight"].T) @ p[f"{name}.lora.2.weight"].T
    return y + p.get(f"{name}.lora.2.bias", 0)


def time_mix(p, x, H, v_first=None):
    """The layer for one sequence x [T, D] from its parameters by name; S is [Dv, Dk]. Returns y and the value."""
    T, D = x.shape
    N = D // H
    before = torch.cat([x.new_zeros(1, D), x[:-1]])
    mix = {c: x + (before - x) * p[f"x_{c}"][0, 0] for c in "rwkvag"}
    r, k, v = (mix[c] @ p[f"{c}_proj.weight"].T for c in "rkv")
    w = torch.exp(-math.exp(-0.5) * torch.sigmoid(lora(p, "w_lora", mix["w"], torch.tanh)))
    a = torch.sigmoid(lora(p, "a_lora", mix["a"], lambda y: y))
    g = lora(p, "g_lora", mix["g"], torch.sigmoid)
    own = v
    if v_first is not None:
        v = v + (v_first - v) * torch.sigmoid(lora(p, "v_lora", mix["v"], lambda y: y))
    kk = k * p["k_k"]
    k = k * (1 + (a - 1) * p["k_a"])
    heads = []
    for h in range(H):
        c = slice(h * N, (h + 1) * N)
        S, rows = x.new_zeros(N, N), []
        for t in range(T):
            kappa = kk[t, c] / kk[t, c].norm()
            S = S * w[t, c] - torch.outer(S @ kappa, kappa * a[t, c]) + torch.outer(v[t, c], k[t, c])
            y = S @ r[t, c]
            y = (y - y.mean()) / torch.sqrt(y.var(unbiased=False) + N * 1e-5)
            y = y * p["g_norm.weight"][c] + p["g_norm.bias"][c]
            rows.append(y + (r[t, c] * k[t, c] * p["r_k"][h]).sum() * v[t, c])
        heads.append(torch.stack(rows))
    return (torch.cat(heads, -1) * g) @ p["o_proj.weight"].T, own


@pytest.mark.parametrize("kernel", ["auto", "chunked", "reference"])
def test_is_its_equations_with_gradients(kernel):
    block = build(RWKV7, num_heads=2, layer_index=1, num_layers=3, kernel=kernel)
    p = dict(block.named_parameters())
    x = normal(2, 37, 32)
    want = torch.stack([time_mix(p, row, 2)[0] for row in x])
    got = block(x)
    torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)
    weight = normal(2, 37, 32, seed=1)
    grads = [torch.autograd.grad((y * weight).sum(), list(p.values())) for y in (got, want)]
    for name, a, b in zip(p, *grads):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("cuts", [(37,), (1, 5, 31)])
def test_value_residual_in_a_stack_written_by_hand(cuts):
    first, second = build(RWKV7, num_heads=2), build(RWKV7, seed=1, num_heads=2, value_residual=True)
    x = normal(1, 37, 32)
    want, value = time_mix(dict(first.named_parameters()), x[0], 2)
    want, _ = time_mix(dict(second.named_parameters()), want, 2, value)
    states = [b.init_state(1) for b in (first, second)]
    parts = []
    for part in x.split(cuts, 1):
        value = first.value(part, state=states[0])
        parts.append(second(first(part, state=states[0]), state=states[1], v_first=value))
    torch.testing.assert_close(torch.cat(parts, 1)[0], want, atol=1e-10, rtol=1e-10)


def test_value_residual_and_v_first_go_together():
    x = normal(1, 3, 32)
    with pytest.raises(ValueError, match="v_first"):
        build(RWKV7, value_residual=True)(x)
    with pytest.raises(ValueError, match="v_first"):
        build(RWKV7)(x, v_first=x)


def test_without_erasing_it_is_decayed_linear_attention():
    block = build(RWKV7, num_heads=2)
    seen = {}
    block.g_norm.register_forward_pre_hook(lambda _, args: seen.update(o=args[0]))
    with torch.no_grad():
        block.a_lora.lora[2].bias.fill_(-1e4)
        block.k_a.zero_()
        x = normal(2, 37, 32)
        block(x)
        before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
        mix = {c: x + (before - x) * getattr(block, f"x_{c}") for c in "rkvw"}
        r, k, v = (getattr(block, f"{c}_proj")(mix[c]).unflatten(-1, (2, 16)) for c in "rkv")
        g = -math.exp(-0.5) * block.w_lora(mix["w"]).sigmoid().unflatten(-1, (2, 16))
        want, _ = linear_attention(r, k, v, g)
    torch.testing.assert_close(seen["o"], want.flatten(0, 1).flatten(1), atol=1e-11, rtol=1e-11)


def test_parameters_of_the_published_size():
    """Names, shapes and initial values at D = 1024, layer 1 of 12, as flash-linear-attention and the official code."""
    with torch.device("cpu"):
        torch.manual_seed(0)
        block = RWKV7(1024, layer_index=1, num_layers=12, value_residual=True)
    shapes = {n: tuple(p.shape) for n, p in block.named_parameters()}
    want = {f"x_{c}": (1, 1, 1024) for c in "rwkvag"} | {"k_k": (1024,), "k_a": (1024,), "r_k": (16, 64)}
    want |= {f"{c}_proj.weight": (1024, 1024) for c in "rkvo"}
    for name, rank in (("w", 64), ("a", 64), ("g", 160), ("v", 64)):
        want |= {f"{name}_lora.lora.0.weight": (rank, 1024), f"{name}_lora.lora.2.weight": (1024, rank)}
        want |= {f"{name}_lora.lora.2.bias": (1024,)} if name != "g" else {}
    want |= {"g_norm.weight": (1024,), "g_norm.bias": (1024,)}
    assert shapes == want
    assert abs(sum(p.numel() for p in block.parameters()) / 4.930e6 - 1) < 1e-3
    w0, a0 = block.w_lora.lora[2].bias, block.a_lora.lora[2].bias
    zigzag = 2.5  # of the first and last channel of a head, -1 and 1, in both directions
    assert w0[0].item() == pytest.approx(-6 + 0.5 - zigzag)
    assert w0[-1].item() == pytest.approx(0.5 + zigzag)
    i, ratio = 70, 1 / 11
    zz = -((2 * (i % 64) / 63 - 1) ** 2)
    assert w0[i].item() == pytest.approx(-6 + 6 * (i / 1023) ** (1 + ratio**0.3) + 0.5 + 2.5 * zz, abs=1e-5)
    assert a0[i].item() == pytest.approx(-0.19 + 0.3 * zz + 0.4 * (i / 1023 - 0.5), abs=1e-6)
    assert block.x_k[0, 0, i].item() == pytest.approx(1 - (i / 1024) ** (0.7 * 11 / 12), abs=1e-6)
    assert block.k_k[i].item() == pytest.approx(0.71 - 0.1 * (i / 1023 - 0.5), abs=1e-6)
    assert block.g_norm.weight[0].item() == pytest.approx(0.2853, abs=1e-4)
    assert block.k_proj.weight.abs().max().item() == pytest.approx(0.05 / 32, rel=1e-3)
    second = block.w_lora.lora[2].weight
    torch.testing.assert_close(second.T @ second, 0.01 * torch.eye(64), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [RWKV7, RWKV7FeedForward])
def test_starts_as_the_identity_of_the_residual_stream(block, dtype):
    assert not block(64, dtype=dtype)(torch.randn(1, 5, 64, dtype=dtype)).any()


def test_half_precision_follows():
    block = build(RWKV7, num_heads=2)
    x = normal(2, 70, 32)
    want = block(x)
    got = block.bfloat16()(x.bfloat16())
    assert ((got - want).norm() / want.norm()).item() < 0.05


def test_channel_mix():
    block = build(RWKV7FeedForward, layer_index=1, num_layers=2)
    x = normal(2, 9, 32)
    before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
    want = torch.relu((x + (before - x) * block.x_k) @ block.key.weight.T) ** 2 @ block.value.weight.T
    torch.testing.assert_close(block(x), want, atol=1e-12, rtol=1e-12)
    second_layer = RWKV7FeedForward(64, layer_index=2, num_layers=2)  # two mixers before it
    assert torch.equal(second_layer.x_k, 1 - (torch.arange(64) / 64) ** 0.5**4)


def test_channel_mix_of_one_token_is_the_mlp():
    block, mlp = build(RWKV7FeedForward), MLP(32, activation="relu2", dtype=torch.float64)
    with torch.no_grad():
        block.x_k.zero_()
        mlp.up_proj.weight.copy_(block.key.weight)
        mlp.down_proj.weight.copy_(block.value.weight)
    x = normal(2, 9, 32)
    torch.testing.assert_close(block(x), mlp(x))


def test_the_shipped_model_streams_and_learns():
    torch.manual_seed(0)
    model = zoo.build("rwkv7_small", ["dim=64", "vocab_size=50"])
    ids = torch.arange(33) % 7
    rate = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = F.cross_entropy(model(ids[None, :-1])[0], ids[1:])
        rate.zero_grad()
        loss.backward()
        rate.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    with torch.no_grad():
        state = model.init_state(1)
        parts = torch.cat([model(part, state=state) for part in ids[None].split((20, 1, 12), 1)], 1)
        torch.testing.assert_close(parts, model(ids[None]), atol=1e-4, rtol=1e-4)
