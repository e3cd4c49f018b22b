"""Scoring and choosing blocks in one step: exactly block_scores followed by select, whatever runs it."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from zoo.kernels import gpu
from zoo.kernels.block_scores import block_scores
from zoo.kernels.select import select
from zoo.kernels.select_blocks import chunked, flops, select_blocks


def draw(B, T, N, Hq, Hkv, D=8, seed=0, dtype=torch.float64):
    """Whole numbers, small enough that many scores are equal and all are exact."""
    g = torch.Generator().manual_seed(seed)
    q, keys = (torch.randint(-2, 3, (B, n, h, D), generator=g).to(dtype) for n, h in ((T, Hq), (N, Hkv)))
    q_index = torch.arange(T).expand(B, T) + torch.tensor([[2], [20]])[:B]
    k_index = torch.where(torch.rand(B, N, generator=g) < 0.9, torch.arange(N) * 3, -1)
    return (q, keys), {"q_index": q_index, "k_index": k_index, "scale": 0.25}


def rules(B, T, N, Hq, seed=0):
    g = torch.Generator().manual_seed(seed)
    yield {}
    yield {"forced": torch.rand(B, 1, T, N, generator=g) < 0.2}
    yield {"visible": torch.rand(Hq, 1, N, generator=g) < 0.7, "forced": torch.rand(N, generator=g) < 0.3}


@pytest.mark.parametrize("k", [0, 1, 4, 50])
@pytest.mark.parametrize("docs", [False, True])
def test_is_scores_and_choice(monkeypatch, k, docs):
    monkeypatch.setattr(chunked, "SCORES_AT_ONCE", 400)  # several pieces, the last one shorter
    B, T, N, Hq = 2, 23, 9, 4
    tensors, masks = draw(B, T, N, Hq, 2)
    if docs:
        masks |= {"q_doc_ids": masks["q_index"] // 11, "k_doc_ids": masks["k_index"] // 11}
    for rule in rules(B, T, N, Hq):
        want = select(block_scores(*tensors, **masks), k, **rule).idx
        for backend in ("chunked", "reference"):
            got = select_blocks(*tensors, k, **masks, **rule, backend=backend, kv_block=3)
            assert torch.equal(got.idx, want) and got.kv_block == 3


@pytest.mark.skipif(not gpu.interpreting(), reason="Triton compiles here: test_rows.py compares on the GPU")
@pytest.mark.parametrize("k", [1, 3])
def test_kernel_chooses_the_same(k):
    pytest.importorskip("triton")
    B, T, N, Hq = 1, 7, 19, 4  # two tiles of blocks
    tensors, masks = draw(B, T, N, Hq, 2, dtype=torch.float32)
    masks["q_index"] = masks["q_index"] * 8
    for rule in rules(B, T, N, Hq):
        want = select(block_scores(*tensors, **masks), k, **rule).idx
        assert torch.equal(select_blocks(*tensors, k, **masks, **rule, backend="triton").idx, want)


@pytest.mark.skipif(not gpu.interpreting(), reason="runs the operators on the CPU")
def test_operators_keep_their_promises():
    scoring = pytest.importorskip("zoo.kernels.block_scores.triton")
    choosing = pytest.importorskip("zoo.kernels.select_blocks.triton")
    (q, keys), masks = draw(1, 3, 4, 2, 1, D=16, dtype=torch.float32)
    order = (masks["q_index"], masks["k_index"], None, None, 0.5)
    torch.library.opcheck(scoring._forward, (q.requires_grad_(), keys.requires_grad_(), *order))
    torch.library.opcheck(choosing.select_blocks, (q.detach(), keys.detach(), 2, *order, None, None))
    with FlopCounterMode(display=False) as counter:
        choosing.select_blocks(q, keys, 2, *order, None, None)
    assert counter.get_total_flops() == flops(1, 3, 4, 2, 16)


def test_negative_zero_equals_zero():
    q, keys = torch.ones(1, 1, 1, 16), torch.zeros(1, 2, 1, 16)
    keys[:, 0] = -0.0
    masks = {"q_index": torch.tensor([[9]]), "k_index": torch.tensor([[1, 3]])}
    backends = ["chunked", "reference"] + (["triton"] if gpu.interpreting() else [])
    for backend in backends:
        for order in ([0, 1], [1, 0]):
            assert select_blocks(q, keys[:, order], 1, **masks, backend=backend).idx.item() == 0


def test_long_lists_and_wide_heads_are_not_for_the_kernel():
    (q, keys), masks = draw(1, 2, 80, 1, 1)
    with pytest.raises(Exception, match="at most 64"):
        select_blocks(q.float(), keys.float(), 65, **masks, backend="triton")
    with pytest.raises(ValueError, match="at least 0"):
        select_blocks(q, keys, -1, **masks)


def test_gradients_do_not_pass_and_it_compiles_whole():
    (q, keys), masks = draw(1, 12, 5, 2, 1)
    q.requires_grad_()

    def run(q, keys):
        return select_blocks(q, keys, 2, **masks).idx

    assert not run(q, keys).requires_grad
    assert torch.equal(torch.compile(run, fullgraph=True, backend="aot_eager")(q, keys), run(q, keys))


def test_scores_have_gradients_under_the_kernel():
    if not gpu.interpreting():
        pytest.skip("test_rows.py compares on the GPU")
    (q, keys), masks = draw(2, 5, 4, 4, 2, D=16, dtype=torch.float32)
    grads = []
    for backend in ("triton", "chunked"):
        leaves = [x.clone().requires_grad_() for x in (q, keys)]
        scores = block_scores(*leaves, **masks, backend=backend)
        torch.where(scores.isfinite(), scores, 0).square().sum().backward()
        grads.append([x.grad for x in leaves])
    for got, want in zip(*grads):
        torch.testing.assert_close(got, want)
