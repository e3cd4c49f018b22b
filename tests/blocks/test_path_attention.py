"""PaTH attention against the product of matrices, written out, and its degenerate cases."""

import pytest
import torch
from torch.nn import functional as F

import zoo

DIM, T = 24, 19


def build(**options):
    options = {"num_heads": 4, "num_kv_heads": 2, "chunk_size": 8, **options}
    block = zoo.create_block("path_attention", DIM, dtype=torch.float64, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in block.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * (2 / p[0].numel() ** 0.5))
    return block


def draw(*shape, seed=2):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def expected(block, x):
    """Outputs of one row x [T, dim]; every product of H is multiplied out."""
    H, G, D = block.num_kv_heads, block.num_heads // block.num_kv_heads, block.head_dim
    q, k, v = (x @ p.weight.T for p in (block.q_proj, block.k_proj, block.v_proj))
    low = x @ block.w_proj[0].weight.T @ block.w_proj[1].weight.T
    taps = block.w_conv1d.weight[:, 0]
    W = taps.shape[1]
    mixed = [sum(taps[:, W - 1 - n] * low[t - n] for n in range(min(W, t + 1))) for t in range(len(x))]
    w = F.silu(torch.stack(mixed)).view(-1, H, D)
    w = w / (w.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    beta = 2 * torch.sigmoid(x @ block.bt_proj.weight.T + block.bt_proj.bias)
    outputs = []
    for i in range(len(x)):
        heads = []
        for h in range(H * G):
            g = h // G
            logits, product, forget = [], torch.eye(D, dtype=x.dtype), 0.0
            for j in range(i, -1, -1):  # product = H_i ... H_{j+1}
                key = k[j].view(H, D)[g]
                logits.append(q[i].view(-1, D)[h] @ product @ key * D**-0.5 + forget)
                product = product @ (torch.eye(D, dtype=x.dtype) - beta[j, g] * torch.outer(w[j, g], w[j, g]))
                if block.g_proj is not None:
                    forget = forget + F.logsigmoid(x[j] @ block.g_proj.weight[h] + block.g_proj.bias[h])
            p = torch.stack(logits).softmax(0)
            heads.append(p @ v[: i + 1].flip(0).view(-1, H, D)[:, g])
        outputs.append(torch.cat(heads))
    return torch.stack(outputs) @ block.o_proj.weight.T


@pytest.mark.parametrize("options", [{}, {"forget_gate": True, "conv_size": 2, "w_rank": 3}, {"chunk_size": 64}])
def test_equations(options):
    block, x = build(**options), draw(1, T, DIM).requires_grad_()
    got, want = block(x), expected(block, x[0])[None]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    wrt = [x, *block.parameters()]
    for a, b in zip(torch.autograd.grad(got.sin().sum(), wrt), torch.autograd.grad(want.sin().sum(), wrt), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("cut", [[1] * T, [8, 8, 3], [3, 1, 10, 5]])
@pytest.mark.parametrize("gate", [False, True])
def test_segments(cut, gate):
    block, x = build(forget_gate=gate), draw(2, T, DIM)
    state = block.init_state(2)
    got = torch.cat([block(part, state=state) for part in x.split(cut, 1)], 1)
    torch.testing.assert_close(got, block(x), rtol=0, atol=1e-10)


def test_packed_documents_are_as_if_alone():
    block, lengths = build(forget_gate=True), [1, 9, 4, 5]
    x, docs = draw(1, T, DIM), torch.repeat_interleave(torch.tensor([-1, 7, 0, 3]), torch.tensor(lengths))[None]
    alone = torch.cat([block(part) for part in x.split(lengths, 1)], 1)
    torch.testing.assert_close(block(x, doc_ids=docs), alone, rtol=0, atol=1e-10)


def test_without_beta_it_is_attention_without_position():
    block = build()
    plain = zoo.create_block("attention", DIM, num_heads=4, num_kv_heads=2, rope=False, dtype=torch.float64)
    shared = dict(plain.named_parameters())
    plain.load_state_dict({n: p for n, p in block.state_dict().items() if n in shared})
    with torch.no_grad():
        block.bt_proj.weight.zero_()
        block.bt_proj.bias.fill_(-1000.0)
    x = draw(2, T, DIM)
    torch.testing.assert_close(block(x), plain(x), rtol=0, atol=1e-10)


def test_reflections_keep_the_norm_of_cached_keys():
    block, x = build(), draw(1, T, DIM)
    with torch.no_grad():
        block.bt_proj.weight.zero_()
        block.bt_proj.bias.fill_(1000.0)
        state = block.init_state(1, T)
        block(x, state=state)
        norms = block.k_proj(x).unflatten(-1, (2, -1)).norm(dim=-1)
    torch.testing.assert_close(state.cache.k.norm(dim=-1), norms, rtol=1e-4, atol=0)  # |w|^2 is 1 but for its 1e-6


def test_keys_are_kept_in_fp32_and_rows_may_differ_in_length():
    assert build().to(torch.bfloat16).init_state(1).cache.k.dtype == torch.float32
    block, x = build(forget_gate=True), draw(2, T, DIM)
    state = block.init_state(2)
    block(x[:, :9], state=state)
    state.reset(torch.tensor([1]))
    got = block(x[:, 9:], state=state)
    torch.testing.assert_close(got[:1], block(x[:1])[:, 9:], rtol=0, atol=1e-10)
    torch.testing.assert_close(got[1:], block(x[1:, 9:]), rtol=0, atol=1e-10)


def test_errors():
    with pytest.raises(ValueError, match="num_kv_heads"):
        build(num_kv_heads=3)
