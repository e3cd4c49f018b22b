"""SeerAttention against dense masks and a gate written out block by block."""

import pytest
import torch

import zoo

DIM, T = 24, 27


def build(**options):
    options = {"num_heads": 4, "num_kv_heads": 2, "block_size": 4, "top_k": 3, "gate_dim": 6, **options}
    block = zoo.create_block("seer_attention", DIM, dtype=torch.float64, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in block.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * (2 / p.shape[-1] ** 0.5))
    return block.eval()


def draw(*shape, seed=2):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rotate(x, positions, base=10000.0):
    """x [T, H, D] at positions [T]."""
    half = x.shape[-1] // 2
    angle = positions[:, None, None] * base ** (-torch.arange(half, dtype=x.dtype) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def expected(block, x):
    """Outputs of one row x [T, dim] and the divergence of each token and group."""
    D, G, size = block.head_dim, block.num_heads // block.num_kv_heads, block.block_size
    q, k, v = ((x @ p.weight.T).view(len(x), -1, D) for p in (block.q_proj, block.k_proj, block.v_proj))
    flat_q, flat_k, place = q.detach(), k.detach(), torch.arange(len(x))
    full = len(x) // size
    pooled = [flat_k[c * size : c * size + size] for c in range(full)]
    pooled = torch.stack([torch.cat([b.amax(0), b.amin(0), b.mean(0)], -1) for b in pooled])
    gate_k = torch.stack([pooled[:, h] @ block.gate_k[h] for h in range(block.num_kv_heads)], 1)
    gate_q = torch.stack(
        [
            sum(flat_q[:, h * G + g] @ block.gate_q[h, g * D : g * D + D] for g in range(G))
            for h in range(block.num_kv_heads)
        ],
        1,
    )
    if block.rope_base:
        q, k = rotate(q, place), rotate(k, place)
        gate_q, gate_k = rotate(gate_q, place), rotate(gate_k, torch.arange(full) * size)
    outputs, losses = [], []
    for t in range(len(x)):
        own = t // size
        for h in range(block.num_kv_heads):
            logits = gate_k[:own, h] @ gate_q[t, h] * block.gate_dim**-0.5
            best = sorted(range(own), key=lambda c: (-logits[c].item(), c))[: block.top_k - 1]
            keys = [j for j in range(t + 1) if j // size in (*best, own)]
            most = torch.zeros(own, dtype=x.dtype)
            for g in range(G):
                scores = k[: t + 1, h] @ q[t, h * G + g] * D**-0.5
                outputs.append(scores[keys].softmax(0) @ v[keys, h])
                most = torch.maximum(most, scores.softmax(0).detach()[: own * size].view(-1, size).amax(-1))
            if own:
                target = most / most.sum()
                losses.append((target * (target.log() - logits.log_softmax(0))).sum())
    count = len(x) * block.num_kv_heads
    return torch.stack(outputs).view(len(x), -1) @ block.o_proj.weight.T, torch.stack(losses).sum() / count


@pytest.mark.parametrize("options", [{}, {"top_k": 1}, {"rope": False, "top_k": 2}, {"top_k": 99, "num_kv_heads": 4}])
@pytest.mark.parametrize("kernel", ["auto", "chunked"])
def test_equations_and_loss(options, kernel):
    block, x = build(kernel=kernel, gate_coef=0.7, **options).train(), draw(1, T, DIM).requires_grad_()
    want, loss = expected(block, x[0])
    got = block(x)
    torch.testing.assert_close(got[0], want, rtol=0, atol=1e-10)
    torch.testing.assert_close(block.metrics["gate_kl"], loss.detach())
    wrt = [x, *block.parameters()]
    total = want.sin().sum() + 0.7 * loss
    for a, b in zip(torch.autograd.grad(got.sin().sum(), wrt), torch.autograd.grad(total, wrt), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("cut", [[1] * T, [4, 4, 19], [3, 1, 20, 3]])
@pytest.mark.parametrize("max_len", [T, None])
def test_segments(cut, max_len):
    block, x = build(), draw(2, T, DIM)
    state = block.init_state(2, max_len)
    got = torch.cat([block(part, state=state) for part in x.split(cut, 1)], 1)
    torch.testing.assert_close(got, block(x), rtol=0, atol=1e-10)


def test_packed_documents_are_as_if_alone():
    block, lengths = build(), [1, 13, 4, 9]
    x, docs = draw(1, T, DIM), torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
    dense = build(top_k=99)
    for b in (block, dense):
        alone = torch.cat([b(part) for part in x.split(lengths, 1)], 1)
        torch.testing.assert_close(b(x, doc_ids=docs), alone, rtol=0, atol=1e-10)


def test_rows_at_different_lengths():
    block, x = build(), draw(2, T, DIM)
    state = block.init_state(2)
    block(x[:, :9], state=state)
    state.reset(torch.tensor([1]))
    got = block(x[:, 9:], state=state)
    torch.testing.assert_close(got[:1], block(x[:1])[:, 9:], rtol=0, atol=1e-10)
    torch.testing.assert_close(got[1:], block(x[1:, 9:]), rtol=0, atol=1e-10)


def test_errors():
    with pytest.raises(ValueError, match="gate_dim"):
        build(gate_dim=5)
