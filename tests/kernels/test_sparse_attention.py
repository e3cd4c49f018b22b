"""Attention over a BlockList: gathered and masked forms against the token loop and against dense attention."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from zoo.kernels import dispatch
from zoo.kernels.block_list import BlockList, sort_ids
from zoo.kernels.sparse_attention import chunked, flops, key_major, sparse_attention
from zoo.kernels.sparse_attention.cost import choose_way


def draw(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def lists(B, H, N, n, num_blocks, kv_block, q_tile, stride=0, seed=0):
    """Random distinct non-overlapping blocks with empty slots, some lists wholly empty."""
    g = torch.Generator().manual_seed(seed)
    order = torch.rand(B, H, N, num_blocks, generator=g).argsort(-1)[..., :n]
    idx = torch.where(torch.rand(order.shape, generator=g) < 0.7, order, -1)
    idx[:, :, 0] = -1
    return BlockList(sort_ids(idx * kv_block if stride == 1 else idx).clamp(min=-1), q_tile, kv_block, stride)


@pytest.fixture(params=["gather", "mask", "key_major"])
def way(request, monkeypatch):
    monkeypatch.setattr(chunked, "choose_way", lambda *sizes: request.param)
    monkeypatch.setattr(key_major, "CHUNK_ELEMENTS", 3000)  # several chunks
    with dispatch.use(sparse_attention="chunked"):
        yield request.param


@pytest.mark.parametrize("list_heads", [1, 2, 6])
@pytest.mark.parametrize("q_tile,kv_block,stride", [(1, 4, 0), (1, 1, 0), (5, 4, 0), (32, 8, 0), (1, 4, 1)])
def test_against_the_token_loop(way, list_heads, q_tile, kv_block, stride):
    B, Tq, Tk, Hq, Hkv, D, Dv = 2, 19, 27, 6, 2, 5, 3
    leaves = [draw(B, Tq, Hq, D), draw(B, Tk, Hkv, D, seed=1), draw(B, Tk, Hkv, Dv, seed=2), draw(B, Tk, 1, seed=3)]
    leaves = [x.requires_grad_() for x in leaves]
    blocks = lists(B, list_heads, -(-Tq // q_tile), 3, -(-Tk // kv_block), kv_block, q_tile, stride)
    weights = draw(B, Tq, Hq, Dv, seed=4), draw(B, Tq, Hq, seed=5)
    q_index = torch.arange(Tq).expand(B, Tq) + torch.tensor([[8], [3]])
    k_index = torch.where(torch.arange(Tk) < torch.tensor([[27], [22]]), torch.arange(Tk), -1)
    documents = {"q_doc_ids": (q_index >= 15).long(), "k_doc_ids": (k_index >= 15).long()}
    for masks in ({}, {"causal": False}, {"window": 7}, documents):
        results = []
        for backend in ("chunked", "reference"):
            q, k, v, bias = leaves
            args = {"q_index": q_index, "k_index": k_index, "k_bias": bias, "scale": 0.7, **masks}
            with dispatch.use(sparse_attention=backend):
                o, lse = sparse_attention(q, k, v, blocks, **args)
            seen = torch.where(torch.isinf(lse), 0, lse)  # both agree on -inf below
            loss = (o * weights[0]).sum() + (seen * weights[1]).sum()
            results.append([o, lse, *torch.autograd.grad(loss, leaves)])
        for fast, slow in zip(*results):
            torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-9)
        assert torch.isneginf(results[0][1]).any() and not torch.isnan(results[0][0]).any()


@pytest.mark.parametrize("q_tile", [1, 7])
def test_all_blocks_listed_is_dense_attention(way, q_tile):
    q, k, v = draw(2, 20, 4, 8), draw(2, 20, 2, 8, seed=1), draw(2, 20, 2, 8, seed=2)
    blocks = BlockList(torch.arange(4, dtype=torch.int32).expand(2, 1, -(-20 // q_tile), 4), q_tile, 6)
    o, _ = sparse_attention(q, k, v, blocks)
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    dense = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(o, dense.transpose(1, 2), rtol=1e-10, atol=1e-10)


def test_gradcheck(way):
    q, k, v = (draw(1, 6, 2, 3, seed=s).requires_grad_() for s in range(3))
    blocks = lists(1, 2, 6, 2, 3, 2, 1)
    assert torch.autograd.gradcheck(
        lambda *x: torch.nan_to_num(torch.stack([y.sum() for y in _finite(*x, blocks)])), (q, k, v)
    )


def _finite(q, k, v, blocks):
    o, lse = sparse_attention(q, k, v, blocks)
    return o, torch.where(torch.isinf(lse), 0, lse)


def test_low_precision_accumulates_in_fp32(way):
    q, k, v = (draw(1, 33, 2, 16, seed=s) for s in range(3))
    blocks = lists(1, 2, 33, 3, 5, 8, 1)
    exact, _ = sparse_attention(*(x.bfloat16().double() for x in (q, k, v)), blocks)
    o, lse = sparse_attention(*(x.bfloat16() for x in (q, k, v)), blocks)
    assert o.dtype == torch.bfloat16 and lse.dtype == torch.float32
    torch.testing.assert_close(o.double(), exact, rtol=8e-3, atol=1e-4)


@pytest.mark.parametrize(
    "T,kv_block,n,q_tile,list_heads,expected",
    [
        (40, 4, 2, 1, 4, "mask"),
        (129, 1, 8, 16, 1, "gather"),
        (600, 1, 3, 1, 4, "gather"),
        (600, 32, 3, 1, 4, "key_major"),
    ],
)
@pytest.mark.parametrize("backend", ["chunked", "auto"])  # whichever row runs, the count is that of the chunked form
def test_cost_is_what_is_counted(T, kv_block, n, q_tile, list_heads, expected, backend):
    q, k, v = draw(2, T, 4, 6), draw(2, T, 2, 6), draw(2, T, 2, 5)
    blocks = lists(2, list_heads, -(-T // q_tile), n, -(-T // kv_block), kv_block, q_tile)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        sparse_attention(q, k, v, blocks, backend=backend)
    assert counter.get_total_flops() == flops(2, T, T, 4, 2, 6, 5, n, kv_block, list_heads, q_tile)
    rows = q_tile * (1 if list_heads == 4 else 2)
    assert choose_way(-(-T // q_tile), rows, T, n, kv_block, -(-T // kv_block)) == expected


def test_wrong_shapes_are_named():
    q = draw(1, 6, 4, 3)
    with pytest.raises(ValueError, match="heads do not fit"):
        sparse_attention(q, q[:, :, :2], q[:, :, :2], lists(1, 3, 6, 2, 3, 2, 1))
    with pytest.raises(ValueError, match="does not serve"):
        sparse_attention(q, q, q, lists(1, 4, 5, 2, 3, 2, 1))


def test_lists_without_slots():
    q = draw(1, 6, 4, 3).requires_grad_()
    o, lse = sparse_attention(q, q, q, BlockList(torch.zeros(1, 1, 6, 0, dtype=torch.int32)))
    assert not o.any() and torch.isneginf(lse).all()
    assert not torch.autograd.grad(o.sum(), q)[0].any()


def test_key_major_compiles_whole(monkeypatch):
    # the conformance suite compiles the other ways inside blocks
    monkeypatch.setattr(chunked, "choose_way", lambda *sizes: "key_major")
    q, k, v = (draw(1, 12, 2, 4, seed=s).requires_grad_() for s in range(3))
    idx = lists(1, 2, 12, 2, 3, 4, 1).idx

    def run(q, k, v, idx):
        return sparse_attention(q, k, v, BlockList(idx, kv_block=4), backend="chunked")[0]

    whole = torch.compile(run, fullgraph=True, backend="aot_eager")
    a, b = run(q, k, v, idx), whole(q, k, v, idx)
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(
        torch.autograd.grad(a.square().sum(), (q, k, v)), torch.autograd.grad(b.square().sum(), (q, k, v))
    )
