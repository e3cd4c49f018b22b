"""chunk_moe and workspace against token loops, with several chunks, documents and ragged streams."""

import pytest
import torch
from torch.nn import functional as F

import zoo.registry as registry
from zoo.blocks.chunks import finished_chunks
from zoo.contract import positions_from

DIM = 16
DOCS = torch.tensor([[0] * 9 + [1] * 2 + [2] * 12, [5] * 23, [0] * 5 + [7] * 5 + [1] * 13])


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def create(name, **options):
    torch.manual_seed(0)
    block = registry.create(name, DIM, dtype=torch.float64, **options).eval()
    for p in block.parameters():
        if p.ndim < 2 or p.abs().max() == 0:
            torch.nn.init.normal_(p)
    return block


def chunk_moe(**options):
    return create("chunk_moe", **{"hidden_dim": 8, "num_experts": 6, "chunk_size": 4} | options)


def workspace(**options):
    return create("workspace", **{"slots": 6, "active": 3, "rank": 5, "chunk_size": 4} | options)


def chunk_moe_loop(block, x):
    """One document [T, D], token by token."""
    outputs, size = [], block.chunk_size
    for t, token in enumerate(x):
        c = t // size
        summary = block.first_chunk if c == 0 else x[(c - 1) * size : c * size].mean(0)
        best = (block.gate.weight @ summary / block.temperature).topk(block.top_k)
        y = 0
        for w, e in zip(best.values.softmax(0), best.indices.tolist()):
            gate, up = (block.experts.gate_up_proj[e] @ token).chunk(2)
            y = y + w * (block.experts.down_proj[e] @ (F.silu(gate) * up))
        outputs.append(y)
    return torch.stack(outputs)


def workspace_loop(block, x):
    """One document [T, D], token by token."""
    memory, chunk, outputs = block.slots, [], []
    for token in x:
        normed = memory / (memory.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        keys = normed @ block.k_proj.weight.t()
        attention = (keys @ (block.q_proj.weight @ token) * block.rank**-0.5).softmax(0)
        outputs.append(torch.sigmoid(block.gate_proj(token)) * (attention @ memory))
        chunk.append(token)
        if len(chunk) == block.chunk_size:
            mean, chunk = torch.stack(chunk).mean(0), []
            keep, write = block.controller(mean).softmax(0)
            rows = list(memory.unbind(0))
            for s in memory.norm(dim=-1).argsort()[: block.active].tolist():
                proposal = block.write_up(torch.sigmoid(keys[s]) * block.write_down(mean))
                rows[s] = keep * rows[s] + write * (0.9 * rows[s] + 0.1 * proposal)
            memory = torch.stack(rows)
    return torch.stack(outputs)


CASES = [
    (chunk_moe, {}, chunk_moe_loop),
    (chunk_moe, {"top_k": 3, "temperature": 0.5, "chunk_size": 5}, chunk_moe_loop),
    (workspace, {}, workspace_loop),
    (workspace, {"active": 6, "chunk_size": 1}, workspace_loop),
    (workspace, {"active": 1, "chunk_size": 7}, workspace_loop),
]


@pytest.mark.parametrize("build, options, loop", CASES)
@pytest.mark.parametrize("length", [1, 3, 4, 5, 23])
def test_equals_the_token_loop(build, options, loop, length):
    block, x = build(**options), draw(3, length, DIM)
    want = torch.stack([loop(block, row) for row in x])
    torch.testing.assert_close(block(x), want, rtol=0, atol=1e-11)


@pytest.mark.parametrize("build, options, loop", CASES)
def test_documents_restart_chunks_forward_and_backward(build, options, loop):
    block, x = build(**options), draw(3, 23, DIM)
    packed = block(x, doc_ids=DOCS)
    parts = [[loop(block, row[ids == d]) for d in ids.unique_consecutive()] for row, ids in zip(x, DOCS)]
    want = torch.stack([torch.cat(row) for row in parts])
    torch.testing.assert_close(packed, want, rtol=0, atol=1e-11)
    parameters = list(block.parameters())
    for g, w in zip(
        torch.autograd.grad(packed.square().sum(), parameters), torch.autograd.grad(want.square().sum(), parameters)
    ):
        torch.testing.assert_close(g, w, rtol=0, atol=1e-9)


@pytest.mark.parametrize("build, options, loop", CASES)
def test_rows_of_a_stream_may_stand_at_different_places(build, options, loop):
    """Rows that advance by themselves (routers) and then together."""
    block, x = build(**options), draw(3, 30, DIM)
    state = block.init_state(3)
    with torch.no_grad():
        for row, ahead in enumerate((2, 9, 0)):
            if ahead:
                index = torch.tensor([row])
                part = state.rows(index)
                block(x[index, :ahead], state=part)
                state.put_rows(index, part)
        starts, got = [2, 9, 0], []
        for size in (1, 6, 3, 1, 4):
            segment = torch.stack([x[b, s : s + size] for b, s in enumerate(starts)])
            got.append(block(segment, state=state))
            starts = [s + size for s in starts]
        want = torch.stack([loop(block, x[b])[s - 15 : s] for b, s in enumerate(starts)])
    torch.testing.assert_close(torch.cat(got, 1), want, rtol=0, atol=1e-11)
    assert state.position.tolist() == starts


@pytest.mark.parametrize("streaming", [False, True])
def test_finished_chunks(streaming):
    x, size = draw(3, 23, DIM), 4
    position = positions_from(None if streaming else DOCS, 3, 23, x.device)
    start = torch.tensor([[0], [3], [5]]) if streaming else 0
    carry = draw(3, DIM, seed=9) * (start % size != 0) if streaming else None
    got = finished_chunks(x, position + start, size, None if streaming else DOCS, carry)
    for b in range(3):
        ids = torch.zeros(23) if streaming else DOCS[b]
        means, rest, count = [], carry[b] if streaming else 0, int(start[b] % size) if streaming else 0
        for t in range(23):
            if t and ids[t] != ids[t - 1]:
                rest, count = 0, 0
            assert got.before[b, t] == len(means)
            rest, count = rest + x[b, t], count + 1
            if count == size:
                means.append(rest / size)
                rest, count = torch.zeros(DIM, dtype=x.dtype), 0
        assert got.total[b] == len(means)
        torch.testing.assert_close(got.means[b, : len(means)], torch.stack(means))
        if streaming:
            torch.testing.assert_close(got.rest[b], rest)


def test_chunk_moe_with_one_expert_is_swiglu():
    block = chunk_moe(num_experts=1, top_k=1)
    swiglu = registry.create("swiglu", DIM, hidden_dim=8, dtype=torch.float64)
    swiglu.gate_proj.weight.data, swiglu.up_proj.weight.data = block.experts.gate_up_proj.data[0].chunk(2)
    swiglu.down_proj.weight.data = block.experts.down_proj.data[0]
    x = draw(2, 13, DIM)
    torch.testing.assert_close(block(x), swiglu(x))


def test_chunk_moe_parameters_loss_and_errors():
    hydra = registry.create("chunk_moe", 2048, num_experts=8, hidden_dim=1360, device="meta")
    one = 3 * 2048 * 1360
    assert sum(p.numel() for p in hydra.parameters()) == 8 * one + 2048 * 8 + 2048
    assert hydra.active_params() == 2 * one + 2048 * 8 + 2048
    block, x = chunk_moe(aux_coef=0.5), draw(2, 23, DIM)
    quiet = chunk_moe(aux_coef=0.0)
    grads = [torch.autograd.grad(b.train()(x).sum(), b.gate.weight)[0] for b in (block, quiet)]
    assert (grads[0] - grads[1]).abs().max() > 1e-4
    assert set(block.metrics) == {"load_entropy", "max_load", "idle_experts"}
    with pytest.raises(ValueError, match="set top_k to 2 or more"):
        chunk_moe(top_k=1)


def test_workspace_gate_and_parameters():
    block, x = workspace(), draw(2, 23, DIM)
    torch.nn.init.zeros_(block.gate_proj.weight)
    torch.nn.init.constant_(block.gate_proj.bias, -1e4)
    assert block(x).abs().max() == 0
    hydra = registry.create("workspace", 2048, device="meta")
    assert sum(p.numel() for p in hydra.parameters()) == 64 * 2048 + 4 * 2048 * 128 + 3 * 2048 + 3
    assert hydra.state_bytes(3, 10**6) == 3 * (65 * 2048 * 4 + 8)
    with pytest.raises(ValueError, match="active=7 is more than slots=6"):
        workspace(active=7)


def test_workspace_writes_the_weakest_slots_and_forgets_with_the_document():
    block, x = workspace(active=2), draw(1, 4, DIM)
    state = block.init_state(1)
    with torch.no_grad():
        block(x, state=state)
    changed = (state.memory[0] - block.slots).abs().amax(-1) > 1e-12
    weakest = block.slots.norm(dim=-1).argsort()[:2]
    assert sorted(changed.nonzero().flatten().tolist()) == sorted(weakest.tolist())
    state.reset()
    with torch.no_grad():
        torch.testing.assert_close(block(x, state=state), block(x))
