"""DeepSeek sparse attention against transformers' DeepSeek-V3.2, dense masks and closed forms of its loss."""

import pytest
import torch

import zoo

DIM, HEADS, T = 32, 4, 23
SIZES = {"q_lora_rank": 12, "kv_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
INDEX = {"index_heads": 7, "index_head_dim": 6}


def redraw(module):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * (0.3 if p.dim() > 1 else 1.0))
    return module


def build(**options):
    options = {"num_heads": HEADS, "top_k": 5, **SIZES, **INDEX, **options}
    return redraw(zoo.create_block("dsa", DIM, dtype=torch.float64, **options)).eval()


def draw(*shape, seed=2):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def scores(block, x):
    """I [T, T] of one row x [T, D], from the equation, head by head."""
    n, positions = block.indexer, torch.arange(len(x))[None]
    latent = block.query_input(x[None])
    k = n.keys(x[None], positions)[0, :, 0]
    q, _ = n.queries(x[None], latent, positions)
    w = x @ n.weights_proj.weight.T
    heads, width = INDEX["index_heads"], INDEX["index_head_dim"]
    return sum(w[:, h, None] * torch.relu(q[0, :, h] @ k.T) for h in range(heads)) * (heads * width) ** -0.5


def chosen(table, top_k):
    """bool [T, T]: the top_k of the visible scores of each row, the earlier of equal ones."""
    mask = torch.zeros_like(table, dtype=torch.bool)
    for t, row in enumerate(table.tolist()):
        mask[t, sorted(range(t + 1), key=lambda s: (-row[s], s))[:top_k]] = True
    return mask


def attention_weights(block, x, mask):
    """Softmax weights of each head [H, T, T] and the outputs [T, H, v], keys and values written out."""
    positions = torch.arange(len(x))[None]
    q, cached = block.project(x[None], block.query_input(x[None]), positions)
    latent, k_rope = cached[0, :, 0].split([block.kv_lora_rank, block.rope_dim], -1)
    kv = block.kv_b_proj(latent).unflatten(-1, (HEADS, -1))
    k = torch.cat([kv[..., : block.nope], k_rope[:, None].expand(-1, HEADS, -1)], -1)
    logits = torch.einsum("thd,shd->hts", q[0], k) * block.scale
    p = logits.masked_fill(~mask, float("-inf")).softmax(-1)
    return p, torch.einsum("hts,shv->thv", p, kv[..., block.nope :])


@pytest.mark.parametrize("top_k", [6, 100])
def test_equals_deepseek_v32(top_k):
    from transformers.models.deepseek_v32 import modeling_deepseek_v32 as m

    config = m.DeepseekV32Config(
        hidden_size=DIM, num_attention_heads=HEADS, num_key_value_heads=HEADS, attention_bias=True,
        attn_implementation="eager", max_position_embeddings=256, **SIZES, index_topk=top_k,
        index_n_heads=INDEX["index_heads"], index_head_dim=INDEX["index_head_dim"],
        rope_parameters={"rope_theta": 10000.0, "rope_type": "default"},
    )  # fmt: skip
    theirs = redraw(m.DeepseekV32Attention(config, 0).double().eval())
    ours = build(bias=True, top_k=top_k)
    ours.load_state_dict(theirs.state_dict())
    x = draw(2, T, DIM)
    mask = torch.zeros(T, T, dtype=torch.float64).masked_fill(torch.ones(T, T).triu(1).bool(), -1e30)
    embeddings = m.DeepseekV32RotaryEmbedding(config)(x, torch.arange(T).expand(2, T))
    want = theirs(x, embeddings, mask.expand(2, 1, T, T))[0]
    torch.testing.assert_close(ours(x), want, rtol=0, atol=3e-5)  # their angles and scores are fp32
    state = ours.init_state(2, T)
    parts = [ours(part, state=state) for part in x.split([4, 1, 1, 17], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), want, rtol=0, atol=3e-5)


@pytest.mark.parametrize("options", [{}, {"q_lora_rank": None}, {"top_k": 1}, {"rope": False, "top_k": 9}])
@pytest.mark.parametrize("kernel", ["auto", "reference"])
def test_equations(options, kernel):
    block, x = build(kernel=kernel, **options), draw(2, T, DIM)
    want = []
    for row in x:
        _, o = attention_weights(block, row, chosen(scores(block, row), block.top_k))
        want.append(block.o_proj(o.flatten(1)))
    torch.testing.assert_close(block(x), torch.stack(want), rtol=0, atol=1e-10)


@pytest.mark.parametrize("top_k", [5, 100])
def test_loss_is_the_divergence_on_the_chosen_set(top_k):
    block, x = build(top_k=top_k, index_coef=0.7).train(), draw(2, T, DIM)
    total = torch.zeros((), dtype=torch.float64)
    for row in x:
        table = scores(block, row)
        mask = chosen(table, top_k)
        target = attention_weights(block, row, mask)[0].mean(0).detach()
        share = table.masked_fill(~mask, float("-inf")).log_softmax(-1)
        total = total + (target[mask] * (target[mask].log() - share[mask])).sum()
    want = torch.autograd.grad(0.7 * total / x[..., 0].numel(), list(block.indexer.parameters()))
    block(x).sum().backward()
    torch.testing.assert_close(block.metrics["index_kl"], total.detach() / x[..., 0].numel())
    for p, g in zip(block.indexer.parameters(), want, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=0, atol=1e-10)


def test_the_loss_teaches_nothing_but_the_indexer():
    x, grads = draw(2, T, DIM), []
    for coefficient in (0.0, 1.0):
        block = build(index_coef=coefficient).train()
        leaf = x.clone().requires_grad_()
        block(leaf).sin().sum().backward()
        assert all((p.grad is None) == (coefficient == 0) for p in block.indexer.parameters())
        rest = [p.grad for n, p in block.named_parameters() if not n.startswith("indexer.")]
        grads.append([leaf.grad, *rest])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_parts_change_nothing(monkeypatch):
    x, results = draw(2, T, DIM), []
    for elements in (1 << 24, 1000):
        monkeypatch.setattr("zoo.blocks.dsa.ELEMENTS_AT_ONCE", elements)
        block = build().train()
        y = block(x)
        y.sum().backward()
        results.append([y.detach(), *(p.grad for p in block.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_a_complete_list_is_mla():
    """The sparse path with top_k one below the length is MLA for all tokens but the last."""
    x = draw(1, T, DIM)
    dense, sparse = build(top_k=T), build(top_k=T - 1)
    torch.testing.assert_close(sparse(x)[:, :-1], dense(x)[:, :-1], rtol=0, atol=1e-10)
    assert (sparse(x)[:, -1] - dense(x)[:, -1]).abs().max() > 1e-6


def test_ranking_depends_on_weights_but_not_on_their_scale():
    block, x = build(), draw(1, T, DIM)
    y = block(x)
    with torch.no_grad():
        block.indexer.weights_proj.weight.mul_(4)
        torch.testing.assert_close(block(x), y, rtol=0, atol=1e-12)
        block.indexer.weights_proj.weight[0].mul_(-3)
    assert (block(x) - y).abs().max() > 1e-3


def test_packed_documents_are_as_if_alone():
    block, lengths = build(), [1, 9, 4, 9]
    x, docs = draw(1, T, DIM), torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
    alone = torch.cat([block(part) for part in x.split(lengths, 1)], 1)
    torch.testing.assert_close(block(x, doc_ids=docs), alone, rtol=0, atol=1e-10)


def test_rows_at_different_lengths():
    block, x = build(), draw(2, T, DIM)
    state = block.init_state(2)
    block(x[:, :9], state=state)
    state.reset(torch.tensor([1]))
    got = block(x[:, 9:], state=state)
    torch.testing.assert_close(got[:1], block(x[:1])[:, 9:], rtol=0, atol=1e-10)
    torch.testing.assert_close(got[1:], block(x[1:, 9:]), rtol=0, atol=1e-10)


def test_errors():
    with pytest.raises(ValueError, match="index_head_dim"):
        build(index_head_dim=2)
