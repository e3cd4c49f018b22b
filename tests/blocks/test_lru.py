"""rg_lru, lru, s4d and hgrn2 against Hugging Face, their equations step by step, and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from zoo import build
from zoo.blocks.hgrn2 import HGRN2
from zoo.blocks.lru import LRU
from zoo.blocks.rg_lru import RecurrentBlock
from zoo.blocks.s4d import S4D
from zoo.registry import create

DIM, T = 32, 45
CUTS = [20, 1, 1, 23]


def redraw(module: nn.Module, seed: int = 0) -> nn.Module:
    """Weights of order one, where a fresh layer is nearly silent."""
    gen = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        with torch.no_grad():
            draw = torch.randn(p.shape, generator=gen, dtype=torch.float64)
            p.copy_(draw / p[0].numel() ** 0.5 if p.ndim > 1 else 0.3 * draw)
    return module.double().eval()


def tokens(seed=1, dim=DIM):
    return torch.randn(2, T, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hugging_face(width=DIM, heads=4):
    from transformers import RecurrentGemmaConfig
    from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRecurrentBlock

    config = RecurrentGemmaConfig(
        hidden_size=DIM, lru_width=width, num_attention_heads=heads, conv1d_width=3, num_hidden_layers=1
    )
    return redraw(RecurrentGemmaRecurrentBlock(config, 0))


# ---------------------------------------------------------------------------------------------- rg_lru
@pytest.mark.parametrize("width", [DIM, 48])
def test_rg_lru_is_that_of_hugging_face(width):
    theirs = hugging_face(width)
    ours = RecurrentBlock(DIM, lru_width=width, num_heads=4, conv_size=3).double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    results = []
    for call in (ours, lambda x: theirs(x, torch.arange(T)[None], None, use_cache=False)[0]):
        x = tokens().requires_grad_()
        y = call(x)
        layer = ours if call is ours else theirs
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, *dict(layer.named_parameters()).values()))))
    names = ["y", "x", *dict(ours.named_parameters())]
    order = {n: g for n, g in zip(["y", "x", *dict(theirs.named_parameters())], results[1])}
    for name, got in zip(names, results[0]):
        # theirs scans in fp32
        assert (got - order[name]).norm() / order[name].norm() < 3e-6, name


@torch.no_grad()
def test_rg_lru_decodes_as_hugging_face_does():
    theirs = hugging_face()
    ours = RecurrentBlock(DIM, num_heads=4, conv_size=3).double()
    ours.load_state_dict(theirs.state_dict())
    x, state = tokens(), ours.init_state(2)
    start = 0
    for length in (20, *[1] * 25):  # its cache takes one prompt, then single tokens
        part, index = x[:, start : start + length], torch.arange(start, start + length)[None]
        want = theirs(part, index, None, use_cache=True)[0]
        torch.testing.assert_close(ours(part, state=state), want, atol=3e-6, rtol=3e-6)
        start += length
    torch.testing.assert_close(state.conv.mT, theirs.conv1d_state, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(state.h.float(), theirs.rg_lru.recurrent_states.float(), atol=1e-6, rtol=1e-5)


def test_rg_lru_is_its_equation():
    block = redraw(RecurrentBlock(DIM, lru_width=48, num_heads=3))
    x, unit = tokens(), block.rg_lru
    u = F.conv1d(F.pad(block.linear_x(x).mT, (3, 0)), block.conv_1d.weight, block.conv_1d.bias, groups=48).mT
    W_i, W_r = (torch.block_diag(*w.mT) for w in (unit.input_gate_weight, unit.recurrent_gate_weight))
    h, rows = torch.zeros(2, 48, dtype=torch.float64), []
    for t in range(T):
        i = torch.sigmoid(u[:, t] @ W_i.T + unit.input_gate_bias.flatten())
        r = torch.sigmoid(u[:, t] @ W_r.T + unit.recurrent_gate_bias.flatten())
        a = torch.sigmoid(-unit.recurrent_param) ** (8 * r)  # as the paper has it: a^(c r), a = sigmoid(-L)
        h = a * h + (torch.sqrt(1 - a**2) if t else 1) * i * u[:, t]
        rows.append(h)
    want = block.linear_out(torch.stack(rows, 1) * F.gelu(block.linear_y(x), approximate="tanh"))
    torch.testing.assert_close(block(x), want, atol=1e-11, rtol=1e-11)


def test_rg_lru_starts_in_its_ring():
    block = RecurrentBlock(8, lru_width=2048, num_heads=64)
    a = torch.exp(-F.softplus(block.rg_lru.recurrent_param.double()))
    assert 0.9 - 1e-6 < a.min() < 0.901 and 0.998 < a.max() < 0.999 + 1e-6
    # uniform over the area: a^2 is uniform
    assert abs(a.square().mean() - (0.9**2 + 0.999**2) / 2) < 0.005
    assert RecurrentBlock(8, lru_width=2048, num_heads=64, dtype=torch.bfloat16).rg_lru.recurrent_param.isfinite().all()


@pytest.mark.parametrize("param", [-200.0, -40.0, 40.0])
def test_rg_lru_gradients_stay_finite_at_the_ends(param):
    block = RecurrentBlock(DIM, num_heads=4)
    with torch.no_grad():
        block.rg_lru.recurrent_param.fill_(param)  # a rounds to 1, or to 0
    block(tokens().float()).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in block.parameters())


def test_rg_lru_sizes():
    # RecurrentGemma-2B: gates in blocks of 256
    assert RecurrentBlock(2560, device="meta").num_heads == 10
    with pytest.raises(ValueError, match="num_heads"):
        RecurrentBlock(DIM, num_heads=5)


@torch.no_grad()
def test_recurrentgemma_is_that_of_hugging_face():
    """The shipped configuration, made small: logits, so scaled embeddings and the cap too."""
    from transformers import RecurrentGemmaConfig
    from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaForCausalLM

    config = RecurrentGemmaConfig(
        hidden_size=64, intermediate_size=192, num_attention_heads=4, num_key_value_heads=1, vocab_size=61,
        attention_window_size=8, num_hidden_layers=3,
    )  # fmt: skip
    ours = build(
        "recurrentgemma_2b",
        ["dim=64", "vocab_size=61", "embedding_scale=8", "trunk[0].repeat=3", "define.recurrent[0].rg_lru.num_heads=4",
         "define.recurrent[1].geglu.hidden_dim=96", "define.local[1].geglu.hidden_dim=96",
         "define.local[0].attention.num_heads=4", "define.local[0].attention.head_dim=16",
         "define.local[0].attention.rotary_dim=8", "define.local[0].attention.window=8"],
    ).double()  # fmt: skip
    theirs, weights = redraw(RecurrentGemmaForCausalLM(config)), {}
    places = {"temporal_block": "items.0.block", "temporal_pre_norm": "items.0.norm",
              "mlp_block": "items.1.block", "channel_pre_norm": "items.1.norm"}  # fmt: skip
    for name, w in theirs.state_dict().items():
        name, w = name.removeprefix("model."), 1 + w if "norm" in name else w
        for their_name, our_name in places.items():
            name = name.replace(their_name, our_name)
        weights[name.replace("embed_tokens", "tok_embeddings").replace("final_norm", "norm")] = w
    ours.load_state_dict(weights, strict=True)
    ids = torch.randint(61, (2, 30), generator=torch.Generator().manual_seed(0))
    want = theirs(ids, use_cache=False).logits
    assert want.abs().max() > 5  # the cap of 30 bends them
    assert (ours(ids) - want).norm() / want.norm() < 3e-6
    theirs.generation_config.eos_token_id, start = None, ids[:, :9]
    want = theirs.generate(start, attention_mask=torch.ones_like(start), max_new_tokens=8, do_sample=False)
    assert torch.equal(ours.generate(start, 8), want)


# ------------------------------------------------------------------------------------------------- lru
@pytest.mark.parametrize("state_dim", [32, 20])
def test_lru_is_its_equation(state_dim):
    block = redraw(LRU(DIM, state_dim=state_dim))
    x = tokens()
    lam = torch.exp(torch.complex(-block.nu_log.exp(), block.theta_log.exp()))
    B, C = torch.complex(block.B_re, block.B_im), torch.complex(block.C_re, block.C_im)
    h, rows = torch.zeros(2, state_dim, dtype=torch.complex128), []
    for t in range(T):
        h = lam * h + block.gamma_log.exp() * (x[:, t].to(h) @ B.T)
        rows.append((h @ C.T).real + block.D * x[:, t])
    first, second = block.out_proj(F.gelu(torch.stack(rows, 1))).chunk(2, -1)
    torch.testing.assert_close(block(x), first * second.sigmoid(), atol=1e-11, rtol=1e-11)


def test_lru_is_a_convolution():
    block = redraw(LRU(DIM, state_dim=20))
    x = tokens()
    lam = torch.exp(torch.complex(-block.nu_log.exp(), block.theta_log.exp()))
    B, C = torch.complex(block.B_re, block.B_im), torch.complex(block.C_re, block.C_im)
    powers = lam ** torch.arange(T)[:, None]
    kernel = torch.einsum("dn,ln,ne->lde", C, powers * block.gamma_log.exp(), B).real  # [T, D, D]
    y = torch.stack([sum(x[:, t - j] @ kernel[j].T for j in range(t + 1)) for t in range(T)], 1) + block.D * x
    torch.testing.assert_close(block(x), F.glu(block.out_proj(F.gelu(y))), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lru_starts_in_its_ring(dtype):
    block = LRU(8, state_dim=4096, r_min=0.5, r_max=0.999, max_phase=0.3, dtype=dtype)
    radius, phase = torch.exp(-block.nu_log.double().exp()), block.theta_log.double().exp()
    slack = 1e-6 if dtype == torch.float32 else 0.02
    assert 0.5 - slack < radius.min() and radius.max() < 0.999 + slack / 20
    assert abs(radius.square().mean() - (0.25 + 0.998) / 2) < 0.02  # uniform over the area
    assert phase.min() > 0 and phase.max() < 0.3 * (1 + slack)
    torch.testing.assert_close(
        block.gamma_log.double().exp().square(), 1 - radius.square(), atol=slack, rtol=3 * slack + 1e-4
    )


def test_lru_states_are_of_order_one():
    block = create("lru", 64)
    state = block.init_state(4)
    with torch.no_grad():
        block(torch.randn(4, 2000, 64, generator=torch.Generator().manual_seed(0)), state=state)
    assert 0.5 < state.h.square().sum(-1).mean().sqrt() < 2


def test_lru_refuses_an_empty_ring():
    with pytest.raises(ValueError, match="r_min"):
        LRU(DIM, r_min=0.9, r_max=0.8)


# ------------------------------------------------------------------------------------------------- s4d
def s4d(seed=0, **options) -> S4D:
    """The layer as it starts, with steps so long that states forget inside the test."""
    torch.manual_seed(seed)
    block = S4D(DIM, **{"state_dim": 16, **options}).double().eval()
    with torch.no_grad():
        block.log_dt += 2
    return block


def s4d_output(block, x, y):
    first, second = block.out_proj(F.gelu(y + block.D * x)).chunk(2, -1)
    return first * second.sigmoid()


@pytest.mark.parametrize("chunk_size", [8, 64])
@pytest.mark.parametrize("init", ["lin", "inv", "real"])
def test_s4d_is_its_zero_order_hold(init, chunk_size):
    block, x = s4d(init=init, chunk_size=chunk_size), tokens()
    A = torch.complex(-block.log_A_real.exp(), block.A_imag)
    C, dt = torch.view_as_complex(block.C), block.log_dt.exp()[:, None]
    A_bar, B_bar = torch.exp(dt * A), (torch.exp(dt * A) - 1) / A
    h, rows = torch.zeros(2, *A.shape, dtype=torch.complex128), []
    for t in range(T):
        h = A_bar * h + B_bar * x[:, t, :, None]
        rows.append(2 * (C * h).sum(-1).real)
    torch.testing.assert_close(block(x), s4d_output(block, x, torch.stack(rows, 1)), atol=1e-11, rtol=1e-11)


def test_s4d_is_the_fft_convolution_with_its_kernel():
    block, x = s4d(chunk_size=16), tokens()
    A = torch.complex(-block.log_A_real.exp(), block.A_imag)
    C, dtA = torch.view_as_complex(block.C), block.log_dt.exp()[:, None] * A
    kernel = 2 * torch.einsum("dn,dnl->dl", C * (dtA.exp() - 1) / A, torch.exp(dtA[..., None] * torch.arange(T))).real
    spectrum = torch.fft.rfft(x.mT, n=2 * T) * torch.fft.rfft(kernel, n=2 * T)
    y = torch.fft.irfft(spectrum, n=2 * T)[..., :T].mT
    torch.testing.assert_close(block(x), s4d_output(block, x, y), atol=1e-11, rtol=1e-11)


@torch.no_grad()
def test_s4d_with_twice_the_step_samples_half_as_often():
    block, x = s4d(chunk_size=16), tokens()
    want = block(x.repeat_interleave(2, 1))[:, 1::2]
    block.log_dt += math.log(2)
    torch.testing.assert_close(block(x), want, atol=1e-11, rtol=1e-11)


@torch.no_grad()
def test_s4d_in_fp32_at_its_longest_memories_and_fastest_phases():
    torch.manual_seed(0)
    block, x = S4D(DIM), torch.randn(1, 1000, DIM)
    block.log_dt.copy_(torch.linspace(math.log(1e-3), math.log(1e-1), DIM))
    got = block(x)
    want = block.double()(x.double())
    assert (got - want).norm() / want.norm() < 2e-5


def test_s4d_starts_as_published():
    lin, inv, real = (S4D(8, state_dim=6, init=init) for init in ("lin", "inv", "real"))
    n = torch.arange(3)
    torch.testing.assert_close(lin.A_imag, (math.pi * n).expand(8, 3))
    torch.testing.assert_close(inv.A_imag, (6 / math.pi * (6 / (2 * n + 1) - 1)).expand(8, 3))
    torch.testing.assert_close(real.log_A_real.exp(), (n + 1.0).expand(8, 3))
    assert (lin.log_A_real.exp() == 0.5).all() and (real.A_imag == 0).all()
    dt = S4D(1024).log_dt.exp()
    assert 9e-4 < dt.min() < 1.2e-3 and 0.08 < dt.max() < 0.101
    with pytest.raises(ValueError, match="even"):
        S4D(8, state_dim=5)


# ----------------------------------------------------------------------------------------------- hgrn2
@pytest.mark.parametrize("options", [{}, {"layer_index": 2, "num_layers": 3}, {"lower_bound": 0.9}])
def test_hgrn2_is_its_recursion(options):
    """outer(1 - f, i) is added to the state that f has decayed."""
    block = redraw(HGRN2(DIM, num_heads=2, chunk_size=16, **options))
    gamma = options.get("lower_bound", 2 / 3 if options else 0.0)
    x = tokens()
    heads = (2, T, 2, 16)
    f = (gamma + (1 - gamma) * torch.sigmoid(block.f_proj(x))).view(heads)
    i, q = block.i_proj(x).view(heads), F.silu(block.q_proj(x)).view(heads)
    S, rows = torch.zeros(2, 2, 16, 16, dtype=torch.float64), []
    for t in range(T):
        S = f[:, t, :, :, None] * S + (1 - f[:, t])[..., None] * i[:, t, :, None]
        rows.append(torch.einsum("bhkv,bhk->bhv", S, q[:, t]).flatten(1) / 4)
    o = torch.stack(rows, 1)
    o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * block.g_norm.weight
    torch.testing.assert_close(block(x), block.o_proj(o), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("scale", [1.0, 100.0])
@torch.no_grad()
def test_hgrn2_keys_and_decays_add_up_to_one(scale):
    block, x = redraw(HGRN2(DIM, num_heads=2, lower_bound=0.25)), scale * tokens()
    log_f, k = block.gates(x)
    torch.testing.assert_close(k + log_f.exp(), torch.ones_like(k), atol=1e-15, rtol=0)
    assert (log_f <= 0).all() and (log_f >= -1.3863).all()  # log 0.25
    state = block.init_state(2)
    block(x, state=state)
    assert state.memory.abs().max() <= block.i_proj(x).abs().max()  # a convex combination of values


def test_hgrn2_sizes():
    assert sum(p.numel() for p in HGRN2(1024, device="meta").parameters()) == 4_195_328  # fla's layer
    assert [HGRN2(d, device="meta").num_heads for d in (32, 256, 1024)] == [1, 2, 8]
    with pytest.raises(ValueError, match="num_heads"):
        HGRN2(DIM, num_heads=5)
    with pytest.raises(ValueError, match="layer_index"):
        HGRN2(DIM, layer_index=3, num_layers=3)


# ------------------------------------------------------------------------------------------- all of them
LAYERS = {
    "rg_lru": lambda: RecurrentBlock(DIM, num_heads=4),
    "lru": lambda: LRU(DIM, state_dim=20),
    "s4d": lambda: S4D(DIM, state_dim=8, chunk_size=8),
    "hgrn2": lambda: HGRN2(DIM, num_heads=2, lower_bound=0.5, chunk_size=8),
}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_a_stream_is_the_whole_in_any_cut(make):
    block, x = redraw(make()), tokens()
    with torch.no_grad():
        for cuts in (CUTS, [1] * T):
            state = block.init_state(2)
            pieces = torch.cat([block(part, state=state) for part in x.split(cuts, 1)], 1)
            torch.testing.assert_close(pieces, block(x), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_packed_documents_are_alone(make):
    block, lengths = redraw(make()), [7, 1, 20, 17]
    ids = torch.repeat_interleave(torch.tensor([5, 2, 9, 3]), torch.tensor(lengths)).expand(2, T)
    results = []
    for packed in (True, False):
        x = tokens().requires_grad_()
        y = block(x, doc_ids=ids) if packed else torch.cat([block(part) for part in x.split(lengths, 1)], 1)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, *block.parameters()))))
    torch.testing.assert_close(*results, atol=1e-9, rtol=1e-9)
