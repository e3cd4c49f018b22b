"""Product-key memory: exactness, the gate, sizes."""

import pytest
import torch

import zoo.registry as registry

DIM = 32
X = torch.randn(2, 5, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def memory(**options):
    torch.manual_seed(0)
    given = {"num_keys": 6, "key_dim": 4, "top_k": 3, "num_heads": 2} | options
    return registry.create("product_key", DIM, dtype=torch.float64, **given)


@pytest.mark.parametrize("query_norm", ["none", "rms"])
def test_equals_scoring_every_slot(query_norm):
    ours = memory(value_dim=12, gated=True, query_norm=query_norm)
    torch.nn.init.normal_(ours.gate_proj.weight)
    query = (X @ ours.q_proj.weight.t()).unflatten(-1, (2, 8))
    if query_norm == "rms":
        torch.nn.init.normal_(ours.q_norm.weight)
        query = query / (query.square().mean(-1, keepdim=True) + 1e-6).sqrt() * ours.q_norm.weight
    first = torch.einsum("bthk,hnk->bthn", query[..., :4], ours.sub_keys[:, 0])
    second = torch.einsum("bthk,hnk->bthn", query[..., 4:], ours.sub_keys[:, 1])
    best = (first[..., :, None] + second[..., None, :]).flatten(-2).topk(3, dim=-1)
    read = (best.values.softmax(-1)[..., None] * ours.values[best.indices]).sum((2, 3))
    want = torch.sigmoid(ours.gate_proj(X)) * ours.o_proj(read)
    torch.testing.assert_close(ours(X), want)
    torch.testing.assert_close(memory_with(ours, "reference")(X), want)


def memory_with(block, kernel):
    block.kernel = kernel
    return block


def test_gate_starts_nearly_closed_and_can_close():
    ours, open_ = memory(gated=True), memory()
    ours.load_state_dict(open_.state_dict(), strict=False)
    torch.testing.assert_close(ours(X), open_(X) * torch.sigmoid(torch.tensor(-2.0, dtype=torch.float64)))
    torch.nn.init.constant_(ours.gate_proj.bias, -1e4)
    assert ours(X).abs().max() == 0


def test_equal_tokens_read_the_same_and_metrics_are_bounded():
    ours = memory().train()
    y = ours(X[:, :1].expand(-1, 4, -1))
    assert (y - y[:, :1]).abs().max() == 0
    assert 0 < ours.metrics["usage"] <= 12 / 36 and ours.metrics["kl"] >= 0
    full = memory(top_k=36, query_norm="none").train()
    torch.nn.init.zeros_(full.q_proj.weight)  # every slot gets the same weight
    full(X)
    assert full.metrics["usage"] == 1 and full.metrics["kl"].abs() < 1e-9


def test_only_read_slots_get_gradient():
    ours = memory()
    ours(X).square().sum().backward()
    touched = (ours.values.grad.abs().sum(-1) > 0).sum()
    assert 0 < touched <= 36 and touched <= 2 * 5 * 2 * 3


def test_sizes_of_hydra_and_of_the_paper():
    hydra = registry.create(
        "product_key", 2048, num_keys=512, key_dim=128, value_dim=256, gated=True, query_norm="none", device="meta"
    )
    table = 512**2 * 256
    rest = 2 * 512 * 128 + 2 * 128 * 2048 + 256 * 2048
    assert sum(p.numel() for p in hydra.parameters()) == table + rest + 2049  # the gate
    assert hydra.active_params() == 8 * 256 + rest + 2049
    decode = hydra.cost(1, 1, 100, "decode")
    assert decode.bytes_read < 4 * (rest + 2049 + 8 * 256 + 2 * 2048) < 4 * table
    paper = registry.create(
        "product_key", 768, num_keys=512, key_dim=128, top_k=32, num_heads=4, query_norm="none", device="meta"
    )
    without_query = sum(p.numel() for p in paper.parameters()) - paper.q_proj.weight.numel()
    assert without_query == 512**2 * 768 + 4 * 2 * 512 * 128


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="more than the num_keys"):
        memory(top_k=37)
